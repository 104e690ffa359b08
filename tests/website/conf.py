"How Sphinx shows the pages that tests/build_site.py writes; see there."
import configparser
from importlib.util import find_spec
from pathlib import Path

here = Path(__file__).resolve().parent
ini = configparser.ConfigParser()
ini.read(here.parents[1]/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
mathjax = Path(find_spec('sphinx-mathjax-offline').origin).parent/'static/mathjax/tex-svg-full.js'

project, version, author, copyright = cfg['title'], cfg['version'], cfg['author'], cfg['copyright']
extensions = ['myst_nb', 'sphinx_design', 'sphinx_copybutton']

smartquotes = False                     # 'exact' is a value
nb_execution_mode = 'off'               # what is stored is shown
nb_merge_streams = True
nb_render_markdown_format = 'myst'      # tables among the outputs
myst_enable_extensions = ['colon_fence', 'dollarmath', 'attrs_block', 'attrs_inline']
myst_heading_anchors = 3
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = 'hide'
add_module_names = False

html_theme = 'pydata_sphinx_theme'
html_title = project
html_static_path = ['style.css', str(mathjax)]
html_css_files = ['style.css']
mathjax_path = mathjax.name             # formulas become drawings: one script, no fonts
html_show_search_summary = False
html_copy_source = html_show_sourcelink = html_show_sphinx = False

copybutton_exclude = '.linenos, .gp, .go'
html_sidebars = {'index': [], 'search': []}
html_theme_options = dict(
    logo=dict(text=project),
    navbar_align='left', navbar_end=['theme-switcher', 'navbar-icon-links'],
    navbar_persistent=['search-button'],
    icon_links=[dict(name='GitHub', url=cfg['git_url'], icon='fa-brands fa-github')],
    search_bar_text='Search lessons and functions', search_as_you_type=True,
    show_nav_level=1, navigation_depth=2, collapse_navigation=False, show_toc_level=2,
    secondary_sidebar_items=['page-toc'], footer_start=['copyright'], footer_end=[],
    pygments_light_style='github-light', pygments_dark_style='github-dark')
html_domain_indices = False
