"""Reads labelled images: one split of a folder, a table, a tar file or an embedded set.

timm, Hugging Face `datasets`, torchvision and scikit-learn do the reading. Added here: one interface,
one order, and no image left out in silence. timm's own datasets put the next image in the place of
one that they cannot read; evaluation must not.
"""

import contextlib
import functools
import hashlib
import io
import logging
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from datasets.exceptions import DatasetsError
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch import nn
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100

_logger = logging.getLogger(__name__)

_SOURCES = (
    "'digits', a folder of class folders, a folder of Parquet files, a .tar file or a folder of them, "
    "'cifar10:<folder>', 'cifar100:<folder>', or a Hugging Face dataset 'user/name'"
)
_CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}
_EXTENSIONS = (*get_img_extensions(), ".webp")
# "jpg", "png", "webp" and "cls" are what WebDataset shards hold
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")
# images that tell one set from another
_LOOKED_AT = 64
_SPLIT_NAMES = (("train", "training"), ("validation", "val", "valid", "eval", "evaluation"))
# SyntaxError is Pillow's word for a broken PNG, TypeError pyarrow's for fields of changing type
_LIBRARY_ERRORS = (
    *(OSError, ValueError, TypeError, RuntimeError, SyntaxError),
    *(tarfile.TarError, DatasetsError, Image.DecompressionBombError),
)


class _Opened(NamedTuple):
    """A reader, its class names, and the split that it reads, None for all there is."""

    reader: Any
    class_names: Sequence[str]
    split: str | None = None


class UnreadableImageError(ValueError):
    """An image cannot be decoded; the message is one line that names it, also from a loader's worker."""

    def __str__(self) -> str:
        # a worker's error reaches the main process with its whole traceback as the message
        return super().__str__().rsplit(f"{type(self).__name__}: ", 1)[-1].strip()


class ImageSet(Dataset[tuple[Image.Image, int]]):
    """Labelled images of one split in a fixed order: item i is (PIL image in RGB, label).

    Attributes:
        data: what `open_images` was given.
        class_names: name of each label.
        num_classes: number of classes.
        split: the split's own name; None if these are all images there are, since `data` names no splits.
    """

    def __init__(
        self,
        reader: Any,
        class_names: Sequence[str],
        data: str,
        limit: int | None = None,
        split: str | None = None,
    ):
        # a timm reader, giving (binary file, label), or a sequence of (PIL image, label)
        self._reader = reader
        self.data = data
        self.split = split
        self.class_names = list(class_names)
        self.num_classes = len(self.class_names)
        count = len(reader)
        self._rows: Sequence[int] = range(count)
        if limit is not None and limit < count:
            self._rows = [index * count // limit for index in range(limit)]

    def __len__(self) -> int:
        return len(self._rows)

    def check_classes(self, model: nn.Module) -> None:
        """Checks that a model tells as many classes apart as there are here.

        Raises:
            ValueError: it does not.
        """
        classes = getattr(model, "num_classes", None)
        if classes != self.num_classes:
            raise ValueError(
                f"data={self.data!r} has {self.num_classes} classes, but the model has {classes}; create it "
                f"with num_classes={self.num_classes}"
            )

    def describe(self) -> str:
        """Number of images, and a digest of the classes and of sizes and labels of some of them."""
        some = [self[index] for index in range(0, len(self), max(1, len(self) // _LOOKED_AT))]
        text = repr((self.class_names, [(image.size, label) for image, label in some]))
        return f"{len(self)}, {hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        row = self._rows[index]
        filename = getattr(self._reader, "filename", None)
        name = filename(row) if callable(filename) else row
        problem = f"data={self.data!r}: image {name!r} cannot be decoded"
        with _explain(problem, "restore or remove it", UnreadableImageError):
            image, label = self._reader[row]
            if isinstance(image, Image.Image):
                return image.convert("RGB"), int(label)
            with image:
                return Image.open(image).convert("RGB"), int(label)


def open_images(data: str | Path, split: str = "validation", *, limit: int | None = None) -> ImageSet:
    """Opens one split of a labelled image set.

    Args:
        data: one of
            "digits": scikit-learn's 1,797 handwritten digits, as 32 x 32 RGB; needs no files;
            a folder `root/<split>/<class>/` or `root/<class>/` of PNG, JPEG or WebP images; labels
            follow timm's natural order of the class names;
            a folder of Parquet files in the Hugging Face image layout;
            a Hugging Face dataset "user/name" or "hfds/user/name";
            a .tar file or a folder of them: WebDataset shards (images with .cls labels beside them)
            or class folders (PNG, JPEG);
            "cifar10:<folder>" or "cifar100:<folder>": the unpacked python archives.
            `datasets` copies tables and WebDataset shards into its cache when they are first opened.
        split: name of the split, "val" being as good as "validation". Without a validation split the
            test split is used, and a path without splits is taken whole, both said in the log.
        limit: at most this many images, spread evenly over the split.

    Raises:
        FileNotFoundError: the path is missing, or the Hugging Face dataset cannot be reached.
        ValueError: `data` or `split` is unknown, or what is there is no labelled image set.
    """
    data = str(data)
    if not data:
        raise ValueError(f"data is empty; give {_SOURCES}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}; None takes all images")
    opened = _open(data, split)
    return ImageSet(opened.reader, opened.class_names, data, limit, opened.split)


def _open(data: str, split: str) -> _Opened:
    """Reader and class names."""
    if data == "digits":
        return _open_digits(split)
    if data.partition(":")[0] in _CIFAR and ":" in data:
        return _open_cifar(data, split)
    path = Path(data).expanduser()
    if path.is_dir():
        return _open_folder(data, path, split)
    if path.suffix == ".tar" and path.is_file():
        return _open_tars(data, split, path, whole=True)._replace(split=None)
    if path.exists():
        raise ValueError(f"data={data!r} is neither a folder nor a .tar file; give {_SOURCES}")
    name = data.removeprefix("hfds/")
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and path.suffix != ".tar":
        return _open_hub(data, split, name)
    if len(path.parts) > 1 or path.suffix == ".tar":
        raise FileNotFoundError(f"data={data!r} does not exist; check the path")
    raise ValueError(f"data={data!r} is unknown; give {_SOURCES}")


def _open_digits(split: str) -> _Opened:
    # scikit-learn takes seconds to import, and only the digits need it
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(
        np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0
    )
    rows = dict(zip(("train", "validation"), parts, strict=True))
    # the intensities are 0 to 16
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    chosen = _choose_split("digits", split, list(rows))
    images = [
        (Image.fromarray(pixels[row]).resize((32, 32), Image.Resampling.BICUBIC), int(digits.target[row]))
        for row in sorted(rows[chosen])
    ]
    return _Opened(images, [str(name) for name in digits.target_names], chosen)


def _open_cifar(data: str, split: str) -> _Opened:
    name, _, folder = data.partition(":")
    archive = _CIFAR[name]
    path = Path(folder).expanduser()
    root = path.parent if path.name == archive.base_folder else path
    remedy = f"unpack {archive.url} there"
    if not (root / archive.base_folder).is_dir():
        raise FileNotFoundError(f"data={data!r} has no folder {archive.base_folder!r}; {remedy}")
    chosen = _choose_split(data, split, ["train", "test"])
    # checks the files' MD5 sums before it unpickles them
    with _explain(f"data={data!r} is incomplete or damaged", remedy):
        images = archive(root, train=chosen == "train")
    return _Opened(images, images.classes, chosen)


def _open_folder(data: str, path: Path, split: str) -> _Opened:
    if any(path.glob("*.parquet")) or any(path.glob("*/*.parquet")):
        return _open_files(data, split, path)
    folders = _subfolders(path)
    # a split is a folder of folders or tar files, a class a folder of images
    splits = [folder.name for folder in folders if _subfolders(folder) or any(folder.glob("*.tar"))]
    chosen = _choose_split(data, split, splits) if splits else None
    if chosen is not None:
        path = path / chosen
        folders = _subfolders(path)
    if any(path.glob("*.tar")):
        opened = _open_tars(data, split, path, whole=bool(splits))
        return opened if chosen is None else opened._replace(split=chosen)
    if not folders:
        raise ValueError(f"data={data!r} holds no images in class folders; give {_SOURCES}")
    remedy = f"put {', '.join(_EXTENSIONS)} files into each class folder or remove the folder"
    with _explain(f"data={data!r} holds no images", remedy):
        reader = ReaderImageFolder(str(path), input_key=";".join(_EXTENSIONS))
    empty = [folder.name for folder in folders if folder.name not in reader.class_to_idx]
    if empty:
        raise ValueError(f"data={data!r}: class folder {empty[0]!r} holds no images; {remedy}")
    if len(reader.class_to_idx) > len(folders):
        raise ValueError(f"data={data!r} holds images outside of its class folders; move or remove them")
    if not splits:
        _log_whole(data, split)
    return _Opened(reader, list(reader.class_to_idx), chosen)


def _open_tars(data: str, split: str, path: Path, *, whole: bool) -> _Opened:
    """Opens the tar file `path`, or all those in the folder `path`; `whole` if they are the split."""
    files = [path] if path.is_file() else sorted(path.glob("*.tar"))
    extensions = set()
    with _explain(f"data={data!r} holds a damaged tar file", "write it anew"):
        for file in files:
            with tarfile.open(file) as tar:
                extensions |= {Path(member.name).suffix.lower() for member in tar if member.isfile()}
    if ".cls" in extensions:
        return _open_files(data, split, path, shards=files if whole else None)
    if ".webp" in extensions or not extensions & set(_EXTENSIONS):
        raise ValueError(
            f"data={data!r} holds {', '.join(sorted(extensions)) or 'nothing'}, but tar files of class "
            f"folders may hold {', '.join(get_img_extensions())}; unpack them, or write WebDataset shards"
        )
    # a cached file handle would be shared by the workers forked after the first access
    reader = ReaderImageInTar(str(path), cache_tarfiles=False, cache_tarinfo=False)
    if "" in reader.class_name_to_idx:
        raise ValueError(f"data={data!r} holds images without a class; put them into class folders")
    if not whole:
        _log_whole(data, split)
    return _Opened(reader, list(reader.class_name_to_idx))


def _open_files(data: str, split: str, path: Path, shards: Sequence[Path] | None = None) -> _Opened:
    """Opens a folder of Parquet files or WebDataset shards, or the `shards` that make up the split."""
    explain = functools.partial(_explain, f"data={data!r} cannot be read", "write its files anew")
    name, data_files = "webdataset", {"train": [str(shard) for shard in shards or ()]}
    chosen, whole = "train", False
    if not shards:
        name = str(path)
        with explain():
            files = dict(datasets.load_dataset_builder(name).config.data_files)
        # `datasets` calls files whose names say nothing "train"
        if set(files) == {"train"} and "train" not in Path(files["train"][0]).name:
            _log_whole(data, split)
            whole = True
        else:
            chosen = _choose_split(data, split, [str(key) for key in files])
        # a split without its files would copy all splits into the cache
        data_files = {chosen: list(files[chosen])}
    with explain():
        table = datasets.load_dataset(name, data_files=data_files, split=chosen)
    return _open_table(data, table)._replace(split=None if whole else chosen)


def _open_hub(data: str, split: str, name: str) -> _Opened:
    problem = f"data={data!r} is no path here and cannot be had from the Hugging Face hub"
    remedy = "check the name and the network, or give a local path"
    with _explain(problem, remedy, FileNotFoundError):
        splits = datasets.get_dataset_split_names(name)
    chosen = _choose_split(data, split, splits)
    with _explain(problem, remedy, FileNotFoundError):
        table = datasets.load_dataset(name, split=chosen)
    return _open_table(data, table)._replace(split=chosen)


def _open_table(data: str, table: Any) -> _Opened:
    """Reader and class names of a Hugging Face dataset."""
    image = next((column for column in _IMAGE_COLUMNS if column in table.column_names), None)
    label = next((column for column in _LABEL_COLUMNS if column in table.column_names), None)
    if image is None or label is None:
        raise ValueError(
            f"data={data!r} has the columns {', '.join(table.column_names)}; name its images one of "
            f"{', '.join(_IMAGE_COLUMNS)} and its labels one of {', '.join(_LABEL_COLUMNS)}"
        )
    if table.features[label].dtype == "string":
        table = table.class_encode_column(label)
    labels = table.unique(label)
    class_names = getattr(table.features[label], "names", None)
    allowed = range(len(class_names) if class_names else sys.maxsize)
    wrong = [number for number in labels if not isinstance(number, int) or number not in allowed]
    if wrong:
        raise ValueError(
            f"data={data!r} has the label {wrong[0]!r} in column {label!r}; choose a split that is "
            "labelled, with class names or numbers from 0"
        )
    names = class_names or [str(number) for number in range(max(labels, default=-1) + 1)]
    return _Opened(_TableReader(table, image, label), names)


class _TableReader:
    """Reads the encoded images of a Hugging Face dataset, with the interface of timm's readers."""

    def __init__(self, table: Any, image: str, label: str):
        self.table = table.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
        self.image, self.label = image, label

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        row = self.table[index]
        image = row[self.image] or {"bytes": b""}
        encoded = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
        return io.BytesIO(encoded), row[self.label]

    def filename(self, index: int) -> str:
        return f"row {index}"


def _choose_split(data: str, split: str, available: list[str]) -> str:
    """The split that is meant by a name."""
    same: tuple[str, ...] = next((names for names in _SPLIT_NAMES if split in names), ())
    for name in (split, *same):
        if name in available:
            return name
    if "validation" in same and "test" in available:
        _logger.warning("sparsifiner: data=%r has no split %r; its split 'test' is used", data, split)
        return "test"
    raise ValueError(
        f"split={split!r} is unknown to data={data!r}; choose one of {', '.join(sorted(available))}"
    )


def _log_whole(data: str, split: str) -> None:
    _logger.info("sparsifiner: data=%r names no splits; all of it is used as %r", data, split)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


@contextlib.contextmanager
def _explain(problem: str, remedy: str, kind: type[Exception] = ValueError) -> Iterator[None]:
    """Makes one line of what a library raises on bad data: the problem, its cause, the remedy."""
    try:
        yield
    except _LIBRARY_ERRORS as error:
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise kind(f"{problem} ({reason}); {remedy}") from error
