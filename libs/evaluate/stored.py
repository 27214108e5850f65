"""Pictures in files by index, to be measured as a network's are."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from datasets import get_dataset
from libs.evaluate.features import to_images
from libs.files import hash_file, map_array
from utils import UserError

THREADS = 8  # that decode files


class StoredImages:
    """The pictures of a folder or a zip file, or arr_0, uint8 (n, H, W, 3), of an .npz, as ADM's
    evaluation suite has them. Those of a folder are cropped and resized to `resolution`, None: the
    first one's smaller side. UserError: no pictures; a damaged file.
    """

    conditional = False

    def __init__(self, path, resolution, device):
        self.device, self.pictures = device, None
        self.record = {"file": str(path), "preprocessing": "none"}
        if str(path).endswith(".npz"):
            self.pictures = stored = map_array(path, "arr_0")
            if stored is None or stored.dtype != np.uint8:
                raise UserError(f"{path} has no arr_0 of uint8 (n, H, W, 3): give ADM's layout")
            side, self.record["sha256"] = stored.shape[1], hash_file(path)
        else:
            given = dict(path=path, resolution=resolution, labels=False)
            self.folder = stored = get_dataset("folder", **given)
            self.record["preprocessing"] = stored.preprocessing
            side, self.record["list_sha256"] = stored.shape[-1], stored.list_sha256(*stored.sizes)
        self.count, self.image_shape = len(stored), (3, side, side)

    def sampling_spec(self):
        """What the pictures are: dict for records."""
        return {"images": self.record, "image_shape": self.image_shape}

    def _read(self, indices):
        if self.pictures is not None:
            return np.array(self.pictures[indices[0] : indices[-1] + 1])
        with ThreadPoolExecutor(THREADS) as threads:
            pixels = list(threads.map(self.folder.pixels, indices))
        return np.stack(pixels).transpose(0, 2, 3, 1)

    def read_ahead(self, batches):
        """float32 (B, 3, H, W) in [0, 1] of each of `batches`, ranges of indices."""
        with ThreadPoolExecutor(1) as reader:
            ahead = None
            for batch in [*batches, None]:
                current, ahead = ahead, batch and reader.submit(self._read, batch)
                if current:
                    yield to_images(current.result(), self.device)
