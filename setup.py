"Package metadata lives in `settings.ini`; this file only hands it to setuptools."
import re
import shlex
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

def words(key): return shlex.split(cfg.get(key, ''))

def lines(key): return cfg[key].strip().splitlines()

def whole(text):
    "Markdown whose links and pictures name the repository, as a page outside of it needs them."
    def address(m):
        return f"{m[1]}{cfg['git_url']}/{'raw' if m[1][0] == '!' else 'blob'}/{cfg['branch']}/{m[2]}"
    return re.sub(r'(!?\[[^\]]*\]\()(?![a-z]+:|#)([^)\s]+)', address, text)

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], license=cfg['license'], url=cfg['git_url'],
    project_urls=dict(line.split('=') for line in lines('project_urls')), classifiers=lines('classifiers'),
    long_description=whole((here/'README.md').read_text(encoding='utf-8')),
    long_description_content_type='text/markdown',
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path']+'.*']),
    package_data={cfg['lib_path']: ['py.typed', 'configs/*.yml', 'configs/*/*.yml']},
    python_requires='>='+cfg['min_python'],
    install_requires=words('requirements'),
    extras_require={name: words(f'{name}_requirements') for name in ('dev', 'docs', 'bench')},
    entry_points={'console_scripts': words('console_scripts'),
                  'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
)
