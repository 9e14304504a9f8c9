# SPDX-License-Identifier: MIT
"""Installs analysys.py and its command; the version is written once, in analysys.py."""

import io
import os
import re

from setuptools import setup

HERE = os.path.dirname(os.path.abspath(__file__))


def read(name):
    with io.open(os.path.join(HERE, name), encoding="utf-8") as file:
        return file.read()


setup(
    name="analysys",
    version=re.search(r'^__version__ = "(.+)"$', read("analysys.py"), re.MULTILINE).group(1),
    description="Server-side events for Analysys Ark (易观方舟), an independent implementation: one file, no dependency",
    long_description=read("README.md"),
    long_description_content_type="text/markdown",
    license="MIT",
    py_modules=["analysys"],
    python_requires=">=3.6",
    entry_points={"console_scripts": ["analysys = analysys:main"]},
)
