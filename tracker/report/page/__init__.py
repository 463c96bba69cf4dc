"""Render one self-contained HTML page.

Modules:
    comparison: Render the comparison of models by their answers.
    html: Render the page from its templates.
    sections: Collect the contents of the page's sections.
    studies: Render the findings of studies.
"""
