"""Render one self-contained HTML page.

Modules:
    html: Render the page, and a comparison of models, from templates.
    sections: Collect the contents of the page's sections.
    studies: Render the findings of studies.
"""
