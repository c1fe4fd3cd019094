"""Proof files as somebody who forges them would write: changed at will, with a fresh checksum."""

import json

from tf_lyapunov.verification import archive, verify


def forged(path, change, model, **options):
    """`Verification` of a file after `change(header, arrays)` has edited both in place."""
    header, arrays = archive.read(path)
    header = json.loads(json.dumps(header))
    arrays = dict(arrays)
    change(header, arrays)
    other = path.with_name("forged.npz")
    archive.write(other, header, arrays)
    return verify(other, model, **options)


def certificate_field(name, value):
    """A change of one field of the certificate."""

    def change(header, arrays):
        header["certificate"][name] = value

    return change


def array(name, value):
    """A change of one array, by a value or by a function of the present one."""

    def change(header, arrays):
        arrays[name] = value(arrays[name]) if callable(value) else value

    return change
