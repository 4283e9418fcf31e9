"""Ways in which a file comes to harm."""


def cut(content):
    return content[: len(content) // 2]


def zeroed(content):
    """As after a power failure: the size is on the disk, the rest is not."""
    return content[: len(content) // 3] + bytes(len(content) - len(content) // 3)


def garbage(content):
    return b"\x93NUMPY" * (len(content) // 6 + 1)


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES = (cut, zeroed, garbage, flipped, None)


def damage(file, kind):
    """Changes a file as a kind of damage does; None removes it."""
    if kind is None:
        file.unlink()
    else:
        content = file.read_bytes()
        assert kind(content) != content
        file.write_bytes(kind(content))
