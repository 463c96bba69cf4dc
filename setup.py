"""Build README.md into the page on PyPI, whose links need addresses."""

import re
import runpy
from pathlib import Path

from setuptools import setup

ADDRESS = runpy.run_path("tracker/schema/distribution.py")["REPOSITORY"]
README = Path("README.md").read_text(encoding="utf-8")
README = re.sub(r"\]\((?!https:|#)", f"]({ADDRESS}/blob/HEAD/", README)
README = re.sub(r'(src|srcset)="(?!https:)', rf'\1="{ADDRESS}/raw/HEAD/', README)

setup(long_description=README, long_description_content_type="text/markdown")
