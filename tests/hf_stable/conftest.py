"""Marks that transformers' own tests carry, see upstream.py."""

MARKS = (
    "accelerate_tests",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "torch_compile_test",
    "torch_export_test",
)


def pytest_configure(config) -> None:
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: transformers' own")
