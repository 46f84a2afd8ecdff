"""Mangled files, twenty thousand of them: what tests/test_mangled.py tries a few of. Every reading
function reads them whole, or refuses them in one line that names the file.

    MANGLED=500 pytest -s tests/nightly/test_mangled_inputs.py     five hundred in all
"""
import os
import time
from collections import Counter

import pytest

import campaign
import conftest
from test_mangled import (
    OPENERS,
    READERS,
    expect_no_complaints,
    open_mangled,
    read_mangled,
    work_folder,  # noqa: F401 (a fixture)
)

MANGLED = int(os.environ.get("MANGLED", 20000))
OF_FOLDERS = 0.1  # the share of the files that lie in folders of models, which take longer


@pytest.mark.parametrize("reader", READERS)
def test_files_of_texts(reader, work_folder):  # noqa: F811
    start, outcomes = time.time(), Counter()
    files = -(-int(MANGLED * (1 - OF_FOLDERS)) // len(READERS))
    complaints = read_mangled(reader, files, campaign.generator(reader), outcomes)
    campaign.note("mangled", f"reader {reader}", start, files=files, **outcomes)
    expect_no_complaints(complaints)


@pytest.mark.parametrize("opener", OPENERS)
def test_folders_of_models_and_indices(opener, work_folder):  # noqa: F811
    start, outcomes = time.time(), Counter()
    files = -(-int(MANGLED * OF_FOLDERS) // len(OPENERS))
    conftest.make_bert(work_folder / "tokenizer")
    complaints = open_mangled(opener, files, campaign.generator(opener), outcomes)
    campaign.note("mangled", f"opener {opener}", start, files=files, **outcomes)
    expect_no_complaints(complaints)
