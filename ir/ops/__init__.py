"""Every operator of the IR but the composites, declared once, by what it does to indices."""
