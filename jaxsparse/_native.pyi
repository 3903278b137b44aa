from typing import Any

cuda_version: int | None
cuda_architectures: str | None
schedule_rows: int
most_group_words: int
forward_tiles: list[tuple[int, int, int, int]]
narrow_tiles: list[tuple[int, int, int, int]]
wgrad_tiles: list[tuple[int, int, int, int]]
float_tiles: list[tuple[int, int, int, int]]
float_wgrad_tiles: list[tuple[int, int, int, int]]

def ffi_version() -> tuple[int, int]: ...
def jaxlib_version() -> str: ...
def cpu_handlers() -> dict[str, Any]: ...
def cuda_handlers() -> dict[str, Any]: ...
