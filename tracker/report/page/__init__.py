"""Render one self-contained HTML page.

Modules:
    html: Render the page from its templates.
    sections: Collect the contents of the page's sections.
    studies: Render the findings of studies.
"""
