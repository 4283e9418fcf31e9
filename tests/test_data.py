"""Every kind of image data, every error, and the loader on top."""

import io
import logging
import pickle
import random
import tarfile
import traceback

import datasets
import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from timm.data import auto_augment

from sparsifiner.data import UnreadableImageError, evaluation_transform, make_loader, open_images

CLASSES = ("cat", "dog")
FORMATS = {".png": "PNG", ".jpeg": "JPEG", ".webp": "WEBP"}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def picture(index, size=8):
    # one color per index survives JPEG
    return Image.new("RGB", (size, size), (20 * index, 250 - 20 * index, 100))


def encode(index, extension=".png"):
    file = io.BytesIO()
    picture(index).save(file, FORMATS[extension])
    return file.getvalue()


def noise():
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def color(image):
    return np.asarray(image).reshape(-1, 3).mean(0)


def write_folder(root, extensions=(".png", ".jpeg", ".webp"), classes=CLASSES):
    """Six images per class; image i of the sorted order has the color of `picture(i)`."""
    index = 0
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(6):
            extension = extensions[number % len(extensions)]
            (root / name / f"{number}{extension}").write_bytes(encode(index, extension))
            index += 1
    return root


def write_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_shard(path, start=0, count=6, **extra):
    files = {}
    for index in range(start, start + count):
        files[f"{index:04d}.jpg"] = encode(index, ".jpeg")
        files[f"{index:04d}.cls"] = str(index % 2).encode()
    return write_tar(path, {**files, **extra})


def write_parquet(path, count=12, image="image", label="label", encoded=None, labels=None, names=CLASSES):
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = [index * 2 // count for index in range(count)] if labels is None else labels
    kind = "string" if isinstance(labels[0], str) else "int64"
    feature = datasets.ClassLabel(names=list(names)) if names else datasets.Value(kind)
    features = datasets.Features({image: datasets.Image(), label: feature})
    rows = [{"bytes": encode(index), "path": f"{index}.png"} for index in range(count)]
    for index, content in (encoded or {}).items():
        rows[index]["bytes"] = content
    datasets.Dataset.from_dict({image: rows, label: labels}, features=features).to_parquet(path)
    return path.parent


def write_cifar(root, monkeypatch, name="cifar10", count=4):
    """Archives of a few images. Their MD5 sums differ, so torchvision is told not to compare them."""
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    key = "labels" if name == "cifar10" else "fine_labels"
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(kind, attribute, [[file, None] for file, _ in getattr(kind, attribute)])
        for file, _ in getattr(kind, attribute):
            pixels = np.stack([np.asarray(picture(index, 32)).transpose(2, 0, 1) for index in range(count)])
            content = {"data": pixels.reshape(count, -1), key: list(range(count))}
            (folder / file).write_bytes(pickle.dumps(content))
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": None})
    names = [f"class {index}" for index in range(10 if name == "cifar10" else 100)]
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: names}))
    return folder


def check_pictures(images, labels, start=0):
    assert len(images) == len(labels)
    for index, label in enumerate(labels):
        image, found = images[index]
        assert isinstance(image, Image.Image)
        assert image.mode == "RGB"
        assert type(found) is int
        assert found == label
        assert np.abs(color(image) - color(picture(start + index))).max() < 4


# sources


def test_digits_are_split_once_and_stratified():
    train, validation = open_images("digits", "train"), open_images("digits")
    assert (len(train), len(validation)) == (1437, 360)
    assert validation.num_classes == 10
    assert validation.class_names == [str(digit) for digit in range(10)]
    image = validation[0][0]
    assert (image.size, image.mode) == ((32, 32), "RGB")
    counts = np.bincount([label for _, label in validation])
    assert counts.min() >= 35
    assert counts.max() <= 37
    again = open_images("digits", "val")
    assert all(
        a[0].tobytes() == b[0].tobytes() and a[1] == b[1] for a, b in zip(validation, again, strict=True)
    )
    seen = [image.tobytes() + bytes([label]) for part in (train, validation) for image, label in part]
    assert len(seen) == 1797


@pytest.mark.parametrize("split", ["validation", "val"])
def test_class_folders_below_a_split(tmp_path, split):
    write_folder(tmp_path / "val")
    write_folder(tmp_path / "train", classes=("cat", "dog", "eel"))
    images = open_images(str(tmp_path), split)
    assert images.class_names == ["cat", "dog"]
    check_pictures(images, [0] * 6 + [1] * 6)
    assert open_images(tmp_path, "train").num_classes == 3


def test_as_many_other_images_are_described_otherwise():
    images = open_images("digits", "train", limit=64)
    others = open_images("digits", "validation", limit=64)
    assert images.describe().split(",")[0] == others.describe().split(",")[0] == "64"
    assert images.describe() != others.describe()


def test_class_folders_without_splits_are_taken_whole_and_it_is_logged(tmp_path, caplog):
    write_folder(tmp_path)
    (tmp_path / ".hidden").mkdir()
    with caplog.at_level(logging.INFO):
        images = open_images(tmp_path)
    check_pictures(images, [0] * 6 + [1] * 6)
    assert "names no splits" in caplog.text


def test_limit_takes_images_from_all_over(tmp_path):
    write_folder(tmp_path)
    images = open_images(tmp_path, limit=4)
    assert [label for _, label in images] == [0, 0, 1, 1]
    assert len(open_images(tmp_path, limit=100)) == 12


@pytest.mark.parametrize(
    ("image", "label"), [("image", "label"), ("img", "label"), ("image", "labels"), ("img", "fine_label")]
)
def test_parquet_by_its_usual_columns(tmp_path, image, label, cache):
    write_parquet(tmp_path / "train-00000-of-00001.parquet", count=4, image=image, label=label)
    write_parquet(tmp_path / "validation-00000-of-00001.parquet", image=image, label=label)
    images = open_images(str(tmp_path))
    assert images.class_names == list(CLASSES)
    check_pictures(images, [0] * 6 + [1] * 6)
    # the other split is not copied into the cache
    assert not list(cache.rglob("*train*.arrow"))
    assert len(open_images(str(tmp_path), "train")) == 4


def test_parquet_in_the_layout_of_the_hub(tmp_path):
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet")
    check_pictures(open_images(tmp_path), [0] * 6 + [1] * 6)


def test_parquet_falls_back_to_the_test_split_and_says_so(tmp_path, caplog):
    write_parquet(tmp_path / "test-00000-of-00001.parquet")
    assert len(open_images(tmp_path)) == 12
    assert "its split 'test' is used" in caplog.text


def test_parquet_without_split_names_is_taken_whole(tmp_path):
    write_parquet(tmp_path / "images.parquet")
    assert len(open_images(tmp_path)) == 12


@pytest.mark.parametrize(
    ("labels", "expected", "names"),
    [([0, 2, 1], [0, 2, 1], ["0", "1", "2"]), (["b", "a", "b"], [1, 0, 1], ["a", "b"])],
)
def test_parquet_whose_labels_are_no_class_labels(tmp_path, labels, expected, names):
    write_parquet(tmp_path / "validation.parquet", count=3, labels=labels, names=None)
    images = open_images(tmp_path)
    check_pictures(images, expected)
    assert images.class_names == names


def test_parquet_written_anew_is_read_anew(tmp_path):
    write_parquet(tmp_path / "validation.parquet")
    assert len(open_images(tmp_path)) == 12
    write_parquet(tmp_path / "validation.parquet", count=4)
    assert len(open_images(tmp_path)) == 4


@pytest.mark.parametrize("name", ["tiny-imagenet", "cifar10"])
def test_shared_parquet_is_what_its_readme_decodes(shared, name):
    parquet = pytest.importorskip("pyarrow.parquet")
    images = open_images(str(shared / "data" / name))
    file = next(file for file in (shared / "data" / name).glob("*.parquet") if "train" not in file.name)
    row = parquet.ParquetFile(file).read_row_group(0).to_pylist()[0]
    expected = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
    assert len(images) == 5000
    assert images.num_classes == {"tiny-imagenet": 200, "cifar10": 10}[name]
    assert images[0][0].tobytes() == expected.tobytes()
    assert images[0][1] == row["label"]


@pytest.mark.parametrize("source", ["nobody/images", "hfds/nobody/images"])
def test_hub_dataset(tmp_path, monkeypatch, source):
    # the hub is out of reach of the tests: a local table takes its place
    local = write_parquet(tmp_path / "test.parquet", image="img")
    load, asked = datasets.load_dataset, []
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train", "test"])
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, split: asked.append((name, split)) or load(str(local), split=split),
    )
    check_pictures(open_images(source), [0] * 6 + [1] * 6)
    assert asked == [("nobody/images", "test")]


def test_tar_file_of_class_folders(tmp_path):
    names = [f"{label}/{number}.png" for label in CLASSES for number in range(3)]
    file = write_tar(tmp_path / "images.tar", {name: encode(index) for index, name in enumerate(names)})
    images = open_images(str(file))
    assert images.class_names == list(CLASSES)
    check_pictures(images, [0, 0, 0, 1, 1, 1])


@pytest.mark.parametrize("folder", ["", "val"])
def test_folder_of_a_tar_file_per_class(tmp_path, folder):
    for start, label in zip((0, 3), CLASSES, strict=True):
        files = {f"{start + number}.png": encode(start + number) for number in range(3)}
        write_tar(tmp_path / folder / f"{label}.tar", files)
    images = open_images(tmp_path)
    assert images.class_names == list(CLASSES)
    check_pictures(images, [0, 0, 0, 1, 1, 1])


def test_shards_named_by_split(tmp_path):
    write_shard(tmp_path / "in-train-000.tar", 0, 2)
    write_shard(tmp_path / "in-validation-000.tar", 0)
    write_shard(tmp_path / "in-validation-001.tar", 6, 4)
    (tmp_path / "_info.json").write_text("{}")
    images = open_images(tmp_path)
    assert images.class_names == ["0", "1"]
    check_pictures(images, [0, 1] * 5)


@pytest.mark.parametrize(("file", "source"), [("val/0.tar", "."), ("0.tar", "."), ("train.tar", "train.tar")])
def test_shards_taken_whole(tmp_path, file, source):
    write_shard(tmp_path / file)
    check_pictures(open_images(tmp_path / source), [0, 1] * 3)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_archives(tmp_path, monkeypatch, name):
    folder = write_cifar(tmp_path, monkeypatch, name)
    images = open_images(f"{name}:{tmp_path}", "test")
    check_pictures(images, [0, 1, 2, 3])
    assert images.num_classes == int(name.removeprefix("cifar"))
    assert len(open_images(f"{name}:{folder}", "train")) == {"cifar10": 20, "cifar100": 4}[name]
    assert len(open_images(f"{name}:{folder}")) == 4


# errors


@pytest.mark.parametrize("source", ["nonsense", "cifar10", "hfds/"])
def test_unknown_source(source):
    with pytest.raises(ValueError, match=f"data='{source}' is unknown; give 'digits', a folder"):
        open_images(source)


@pytest.mark.parametrize(
    "source", ["/no/such/folder", "./no/such", "no/such/folder", "no/such.tar", "~/no/such"]
)
def test_missing_path(source):
    with pytest.raises(FileNotFoundError, match="does not exist; check the path"):
        open_images(source)


def test_path_to_another_file(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"images.zip' is neither a folder nor a .tar file"):
        open_images(tmp_path / "images.zip")


@pytest.mark.parametrize("source", ["nobody/nothing", "hfds/nobody/nothing"])
def test_hub_out_of_reach(source):
    with pytest.raises(
        FileNotFoundError, match=f"data='{source}' is no path here and cannot be had"
    ) as error:
        open_images(source)
    assert "check the name and the network" in str(error.value)


@pytest.mark.parametrize("layout", ["", "cat", "train/cat"])
def test_folder_without_images(tmp_path, layout):
    (tmp_path / layout).mkdir(parents=True, exist_ok=True)
    (tmp_path / layout / "readme.txt").write_text("none")
    with pytest.raises(ValueError, match="holds no images") as error:
        open_images(tmp_path, "train")
    assert str(tmp_path) in str(error.value)


def test_empty_class_folder(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "eel").mkdir()
    with pytest.raises(ValueError, match=r"class folder 'eel' holds no images; put \.png"):
        open_images(tmp_path)


def test_images_outside_of_class_folders(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "stray.png").write_bytes(encode(0))
    with pytest.raises(ValueError, match="images outside of its class folders"):
        open_images(tmp_path)


def test_unknown_split_lists_those_available(tmp_path, monkeypatch):
    write_folder(tmp_path / "folder" / "train")
    write_parquet(tmp_path / "table" / "train-0.parquet")
    write_shard(tmp_path / "shards" / "train-0.tar")
    write_cifar(tmp_path, monkeypatch)
    for source, split, available in [
        ("digits", "test", "train, validation"),
        (f"cifar10:{tmp_path}", "extra", "test, train"),
        *((str(tmp_path / name), "validation", "train") for name in ("folder", "table", "shards")),
    ]:
        with pytest.raises(ValueError, match=f"split='{split}' is unknown") as error:
            open_images(source, split)
        assert str(error.value).endswith(f"choose one of {available}")
        assert repr(source) in str(error.value)


def test_limit_below_one():
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        open_images("digits", limit=0)


def corrupt_folder(root, content):
    write_folder(root, extensions=(".png",))
    (root / "dog" / "2.png").write_bytes(content)
    return root, "dog/2.png"


def corrupt_parquet(root, content):
    return write_parquet(root / "validation.parquet", encoded={8: content}), "row 8"


def corrupt_tar(root, content):
    files = {f"{label}/{number}.png": encode(0) for label in CLASSES for number in range(6)}
    return write_tar(root / "images.tar", {**files, "dog/2.png": content}), "dog/2.png"


def corrupt_shard(root, content):
    return write_shard(root / "images.tar", 0, 8, **{"0008.jpg": content, "0008.cls": b"1"}), "row 8"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", [b"", b"no image", noise()[:200]], ids=["empty", "text", "truncated"])
@pytest.mark.parametrize("corrupt", [corrupt_folder, corrupt_parquet, corrupt_tar, corrupt_shard])
def test_corrupt_image_is_named_and_never_skipped(tmp_path, corrupt, content, workers):
    source, name = corrupt(tmp_path / "data", content)
    images = open_images(source)
    images[7]
    with pytest.raises(UnreadableImageError) as error:
        images[8]
    loader = make_loader(images, torchvision.transforms.functional.to_tensor, 2, workers=workers)
    with pytest.raises(ValueError, match="cannot be decoded") as loaded:
        list(loader)
    # or the iterator lives in a cycle of the traceback, and its workers take 10 s to end
    traceback.clear_frames(loaded.tb)
    for message in (str(error.value), str(loaded.value)):
        assert message.startswith(f"data='{source}': image '{name}' cannot be decoded (")
        assert message.endswith("); restore or remove it")
        assert "\n" not in message


def test_image_removed_after_opening(tmp_path):
    images = open_images(write_folder(tmp_path))
    (tmp_path / "cat" / "0.png").unlink()
    with pytest.raises(UnreadableImageError, match="No such file"):
        images[0]


def test_row_without_an_image(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    table = datasets.Dataset.from_dict({"image": [None], "label": [0]}, features=features)
    table.to_parquet(tmp_path / "validation.parquet")
    with pytest.raises(UnreadableImageError, match="'row 0' cannot be decoded"):
        open_images(tmp_path)[0]


def test_table_without_images_or_labels(tmp_path):
    write_parquet(tmp_path / "validation.parquet", image="photo")
    with pytest.raises(ValueError, match="has the columns photo, label; name its images one of image, img"):
        open_images(tmp_path)


@pytest.mark.parametrize("labels", [[0, -1], [0, None]])
@pytest.mark.parametrize("names", [CLASSES, None])
def test_table_with_hidden_labels(tmp_path, labels, names):
    write_parquet(tmp_path / "validation.parquet", count=2, labels=labels, names=names)
    with pytest.raises(ValueError, match=f"has the label {labels[1]} in column 'label'; choose a split"):
        open_images(tmp_path)


def test_table_without_rows(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    table = datasets.Dataset.from_dict({"image": [], "label": []}, features=features)
    table.to_parquet(tmp_path / "validation.parquet")
    with pytest.raises(ValueError, match="corresponds to no data"):
        open_images(tmp_path)


def test_damaged_parquet(tmp_path):
    write_parquet(tmp_path / "validation.parquet")
    whole = (tmp_path / "validation.parquet").read_bytes()
    (tmp_path / "validation.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read") as error:
        open_images(tmp_path)
    assert "Parquet" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_damaged_tar(tmp_path, keep):
    whole = write_shard(tmp_path / "images.tar").read_bytes()
    (tmp_path / "images.tar").write_bytes(whole[:keep])
    with pytest.raises(ValueError, match="holds a damaged tar file"):
        open_images(tmp_path / "images.tar")


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({}, "holds nothing, but"),
        ({"cat/0.txt": b""}, "holds .txt, but"),
        ({"cat/0.png": encode(0), "cat/1.webp": encode(0, ".webp")}, "write WebDataset shards"),
        ({"0.png": encode(0)}, "images without a class"),
        ({"0.png": encode(0), "0.cls": b"one"}, "cannot be read"),
        ({"0.png": encode(0), "1.cls": b"1"}, "cannot be read|has the label None"),
    ],
)
def test_tar_that_is_no_image_set(tmp_path, files, match):
    with pytest.raises(ValueError, match=match):
        open_images(write_tar(tmp_path / "images.tar", files))


def test_cifar_missing_or_damaged(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="has no folder 'cifar-10-batches-py'; unpack https"):
        open_images(f"cifar10:{tmp_path}")
    with monkeypatch.context() as patch:
        write_cifar(tmp_path, patch)
    # torchvision compares MD5 sums before it unpickles, and these are not the real archives
    with pytest.raises(ValueError, match="is incomplete or damaged"):
        open_images(f"cifar10:{tmp_path}")


# transform and loader


@pytest.fixture(scope="module")
def model():
    return timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=12, num_heads=3)


def test_transform_follows_the_model(model):
    image = Image.new("RGB", (300, 200), (255, 0, 0))
    assert evaluation_transform(model)(image).shape == (3, 224, 224)
    # mean and std of this model are one half
    assert evaluation_transform(model)(image)[:, 0, 0].tolist() == [1, -1, -1]
    smaller = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=12, num_heads=3, img_size=64)
    assert evaluation_transform(smaller)(image).shape == (3, 64, 64)
    smaller.set_input_size(img_size=(96, 128))
    assert evaluation_transform(smaller)(image).shape == (3, 96, 128)


def test_transform_overrides(model):
    image = Image.new("RGB", (64, 64), (255, 0, 0))
    image.paste((0, 0, 255), (16, 16, 48, 48))
    options = {"img_size": 32, "mean": (0, 0, 0), "std": (1, 1, 1), "interpolation": "nearest"}
    whole = evaluation_transform(model, crop_pct=1.0, **options)(image)
    center = evaluation_transform(model, crop_pct=0.5, **options)(image)
    assert whole[0].mean() == 0.75
    assert center[0].mean() == 0
    assert evaluation_transform(model, img_size=(32, 48))(image).shape == (3, 32, 48)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"img_size": 0}, "img_size must be a side"),
        ({"img_size": (3, 32, 32)}, "img_size must be a side"),
        ({"mean": (0.5,)}, "mean must have 3 numbers"),
        ({"std": (1, 1)}, "std must have 3 numbers"),
        ({"std": (1, 1, 0)}, "std must be positive"),
        ({"crop_pct": 0}, "crop_pct must lie in"),
        ({"crop_pct": 87.5}, "crop_pct must lie in"),
        ({"interpolation": "cubic"}, "interpolation='cubic' is unknown; choose one of nearest"),
    ],
)
def test_transform_rejects(model, options, match):
    with pytest.raises(ValueError, match=match):
        evaluation_transform(model, **options)


def test_loader_gives_the_same_batches_with_workers(tmp_path, model):
    transform = evaluation_transform(model, img_size=32)
    names = [f"{label}/{number}.png" for label in CLASSES for number in range(5)]
    sources = [
        "digits",
        write_folder(tmp_path / "folder"),
        write_parquet(tmp_path / "table" / "validation.parquet"),
        write_tar(tmp_path / "images.tar", {name: encode(index) for index, name in enumerate(names)}),
        write_shard(tmp_path / "shards" / "0.tar", 0, 10),
    ]
    for source in sources:
        images = open_images(source, limit=10)
        images[0]
        here, there = (list(make_loader(images, transform, 4, workers=workers)) for workers in (0, 2))
        assert [batch.shape for batch, _ in here] == [(4, 3, 32, 32), (4, 3, 32, 32), (2, 3, 32, 32)]
        assert here[0][0].dtype == torch.float32
        assert here[0][1].dtype == torch.int64
        assert torch.cat([labels for _, labels in here]).tolist() == [label for _, label in images]
        for (image, label), (other_image, other_label) in zip(here, there, strict=True):
            assert torch.equal(image, other_image)
            assert torch.equal(label, other_label)
        copied = pickle.loads(pickle.dumps(images))
        assert copied[3][0].tobytes() == images[3][0].tobytes()


@pytest.mark.parametrize(("batch_size", "workers"), [(0, 0), (1, -1)])
def test_loader_rejects(model, batch_size, workers):
    with pytest.raises(ValueError, match=r"(batch_size|workers) must be at least"):
        make_loader(open_images("digits"), evaluation_transform(model), batch_size, workers=workers)


def test_randaugment_posterizes_at_level_10(monkeypatch):
    # timm then asks pillow to keep 0 bits, which pillow 13 rejects
    kept = []
    posterize = auto_augment.posterize
    monkeypatch.setitem(
        auto_augment.NAME_TO_OP,
        "PosterizeIncreasing",
        lambda image, bits, **options: kept.append(bits) or posterize(image, bits, **options),
    )
    augment = auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", {"translate_const": 10})
    random.seed(0)
    np.random.seed(0)
    for _ in range(4000):
        assert augment(picture(3, 32)).size == (32, 32)
    assert 0 in kept
