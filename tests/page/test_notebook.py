"""docs/first_steps.ipynb runs as it stands, and opens with what it shows."""

import nbformat
import pytest
import runs
from nbclient import NotebookClient

PATH = runs.ROOT / "docs" / "first_steps.ipynb"


def list_shown(notebook):
    """What is shown, in order: stdout, or the best type before text/plain, image/png or svg+xml."""
    outputs = (x for cell in notebook.cells for x in cell.get("outputs", ()))
    return [x.get("name") or sorted(x.data)[-2] for x in outputs]


@pytest.mark.timeout(600)
def test_the_notebook_opens_with_outputs_and_runs(tmp_path, monkeypatch):
    """With few steps of training; what is shown is of the same kinds."""
    notebook = nbformat.read(PATH, 4)
    expected = list_shown(notebook)
    assert expected.count("image/png") == 3 and expected.count("image/svg+xml") == 2
    for name, value in {"STEPS": 20, "FOLDER": tmp_path, "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, str(value))
    where = {"metadata": {"path": str(PATH.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    assert list_shown(notebook) == expected
