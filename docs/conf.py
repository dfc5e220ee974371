"""How Sphinx builds these pages: ``make docs``. They are Markdown, and read as well without it."""

project = "megatron-wallfacer"
copyright = "megatron-wallfacer contributors"  # Sphinx wants this name

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

# Headings can be linked to, as on GitHub: page.md#heading.
myst_heading_anchors = 3
# Blocks without a language are output or commands of a shell: nothing to colour.
highlight_language = "none"
html_theme = "furo"
html_title = project
html_copy_source = False
