"""Processes of their own for tests that kill them."""

import multiprocessing


def clean_processes(module):
    """A context whose processes begin where a module was imported and nothing else was done.

    A process that is forked from a test's own cannot differentiate once that one has threads of autograd,
    which tests that compile start.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context
