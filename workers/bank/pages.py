"""Which row pages are free. One page is one rank row; an adapter's pages need not be neighbours."""

from __future__ import annotations

import heapq

NULL_PAGE = 0  # a row of zeros: a scale or a bias that stays
ONES_PAGE = 1  # a row of ones: the side of a row that changes nothing (IA3)
NUM_RESERVED = 2


class PageAllocator:
    """Hands out pages lowest first, so that allocators with the same history hold the same state.

    Knows nothing of what lies in a page. Not thread-safe: the bank's lock guards it.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(NUM_RESERVED, NUM_RESERVED + num_pages))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> tuple[int, ...]:
        """The `count` lowest free pages; the caller asked `num_free` first."""
        if count > len(self._free):
            raise ValueError(f"{count} pages asked of {len(self._free)} free")
        return tuple(heapq.heappop(self._free) for _ in range(count))

    def free(self, pages: tuple[int, ...]) -> None:
        for page in pages:
            heapq.heappush(self._free, page)

    def clone(self) -> PageAllocator:
        """An allocator with the same state and a life of its own."""
        twin = PageAllocator(0)
        twin.num_pages = self.num_pages
        twin._free = list(self._free)
        return twin

    def check_integrity(self, used: list[int]) -> bool:
        """Every page is free once or used once."""
        pages = sorted([*self._free, *used])
        return pages == list(range(NUM_RESERVED, NUM_RESERVED + self.num_pages))
