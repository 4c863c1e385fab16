"""What holds for all tests."""

import gc


def pytest_collection_finish() -> None:
    """What the imports of all tests have made stays; so collections of garbage, of which there are many, pass it by."""
    gc.collect()
    gc.freeze()
