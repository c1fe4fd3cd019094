"""Calls the command line within a test."""

from tf_lyapunov.cli import main


def call(capsys, *arguments):
    """`(exit code, standard output, messages in one line)`; fails where a traceback is shown."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, out, " ".join(err.split())
