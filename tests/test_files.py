"""Files from others: no code in them runs, a broken one is named, and reading changes nothing."""

import os
import pickle

import numpy as np
import pytest
import torch
from runs import snapshot
from safetensors.torch import save_file

from datasets import get_dataset
from libs.data.official_latents import read_latent_file
from libs.files import read_array, read_arrays, read_safetensors, read_torch
from utils import UserError

MOMENTS = np.arange(8 * 2 * 2, dtype=np.float32).reshape(8, 2, 2)


class Call:
    """Pickles as a call of os.mkdir, which an ordinary unpickler makes."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pair(moments, label):
    array = np.empty(2, object)
    array[:] = [moments, label]
    return array


def write_pth(path, content=1.0, **options):
    torch.save({"a": torch.arange(1000.0), "b": content}, path, **options)


def write_old_pth(path, content=1.0):
    write_pth(path, content, _use_new_zipfile_serialization=False)


def write_pair(path, content=3):
    np.save(path, pair(MOMENTS, content), allow_pickle=True)


def write_npz(path, content=3):
    with open(path, "wb") as file:
        label = np.array(content, None if isinstance(content, int) else object)
        np.savez(file, z=MOMENTS, label=label)


READERS = {  # name: (reader, writer)
    "x.pth": (read_torch, write_pth),
    "training.pt": (read_torch, write_old_pth),
    "0.npy": (read_latent_file, write_pair),
    "0.npy.npz": (read_latent_file, write_npz),
    "x.npz": (read_arrays, write_npz),
}


@pytest.mark.parametrize("name", READERS)
def test_no_code_from_a_file_runs(tmp_path, name):
    reader, write = READERS[name]
    write(tmp_path / name)
    reader(tmp_path / name)
    victim = tmp_path / "executed"
    write(tmp_path / name, Call(victim))
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=f"{name} is damaged or no .*no code from files is run"):
        reader(tmp_path / name)
    assert not victim.exists() and snapshot(tmp_path) == before


def test_no_code_from_a_cifar10_batch_runs(tmp_path, cifar10):
    folder = cifar10(tmp_path)
    batch = {"data": Call(tmp_path / "executed"), "labels": [0]}
    (folder / "data_batch_2").write_bytes(pickle.dumps(batch))
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="has no cifar-10-batches-py as published"):
        get_dataset("cifar10", path=tmp_path)
    assert not (tmp_path / "executed").exists() and snapshot(tmp_path) == before


def test_an_array_of_pointers_is_not_taken(tmp_path):
    """Numbers said to be objects, which numpy's own unpickling can be made to follow."""
    write_pair(tmp_path / "0.npy")
    whole = (tmp_path / "0.npy").read_bytes()
    (tmp_path / "0.npy").write_bytes(whole.replace(b"f4", b"O8"))
    with pytest.raises(UserError, match="0.npy is damaged .*holds <O8"):
        read_array(tmp_path / "0.npy")


@pytest.mark.parametrize("name", [*READERS, "x.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"text that is none of these formats"])
def test_a_broken_file_is_named(tmp_path, name, content):
    reader, write = READERS.get(name, (read_safetensors, None))
    path = tmp_path / name
    if write:
        write(path)
    else:
        save_file({"a": torch.arange(1000.0)}, path)
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(UserError, match=f"{name} is damaged or no "):
        reader(path)


@pytest.mark.parametrize("name, content", [
    ("0.npy.npz", lambda path: np.savez(path.with_suffix(""), mu=MOMENTS)),
    ("0.npy", lambda path: np.save(path, pair(MOMENTS, None)[:1], allow_pickle=True)),
])  # fmt: skip
def test_latents_of_another_content_are_named(tmp_path, name, content):
    content(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} is damaged or no file of moments and a label"):
        read_latent_file(tmp_path / name)


def test_what_the_system_says_is_not_the_files_fault(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        read_torch(tmp_path / "absent.pth")


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("label", [417, np.int64(417), np.array(417)])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<f8"])
def test_pickled_pairs_in_every_dialect(tmp_path, protocol, label, dtype):
    """As np.save(file, (moments, label)) of numpy before 1.24 wrote them."""
    moments = np.asfortranarray(MOMENTS.astype(dtype))
    data = pickle.dumps(pair(moments, label), protocol)
    if protocol < 4:  # of which the former name was
        data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    with open(tmp_path / "0.npy", "wb") as file:
        header = {"descr": "|O", "fortran_order": False, "shape": (2,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(data)
    read, number = read_latent_file(tmp_path / "0.npy")
    np.testing.assert_array_equal(read, MOMENTS)
    assert read.dtype == np.float32 and number == 417


def test_a_mapped_file_is_not_written(tmp_path):
    write_pth(tmp_path / "x.pth")
    before = snapshot(tmp_path)
    tensors = read_torch(tmp_path / "x.pth")
    tensors["a"].zero_()
    assert snapshot(tmp_path) == before
