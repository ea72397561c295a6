"""Which pages of the pool are whose: reference counts, and the tree of those that later requests may find again.

Sources: PagedAttention, Kwon et al., arXiv 2309.06180, §4; RadixAttention, Zheng et al., arXiv 2312.07104, §3, with one page an edge.
"""

from collections import OrderedDict
from typing import List, Optional, Sequence

import numpy as np


class PagePool:
    """``count`` pages of ``size`` tokens, each free or held by ``refs[page]`` holders.

    >>> pool = PagePool(3, 16)
    >>> pages = pool.take(2)
    >>> pool.share(pages[:1]), pool.release(pages), pool.free
    (None, None, 2)
    """

    def __init__(self, count: int, size: int):
        self.count, self.size, self.free = count, size, count
        self.refs = np.zeros(count, np.int32)
        self._stack = np.arange(count, dtype=np.int32)[::-1].copy()  # the free ones; low pages first, so that few are ever touched

    def take(self, count: int) -> Optional[np.ndarray]:
        """That many free pages, int32, with one holder each; None where there are fewer."""
        if count > self.free:
            return None
        self.free -= count
        pages = self._stack[self.free:self.free + count][::-1].copy()
        self.refs[pages] = 1
        return pages

    def share(self, pages: np.ndarray | Sequence[int]) -> None:
        """One more holder of each; no page may be named twice."""
        self.refs[np.asarray(pages, np.int32)] += 1

    def release(self, pages: np.ndarray | Sequence[int]) -> None:
        """One holder less of each, the same way."""
        pages = np.asarray(pages, np.int32)
        self.refs[pages] -= 1
        left = self.refs[pages]
        if len(left) and left.min() < 0:
            raise AssertionError(f"page {pages[left.argmin()]} was released by more than held it")
        freed = pages[left == 0]
        self._stack[self.free:self.free + len(freed)] = freed[::-1]
        self.free += len(freed)


class PrefixTree:
    """Full pages by the tokens that lead to them. A node is its page; its edge, (parent page or −1, the page's tokens). The tree is
    one holder of each; whoever ends a request leaves its pages here, until ``evict`` needs them.

    >>> pool = PagePool(4, 2)
    >>> tree, ids = PrefixTree(pool), np.arange(5)
    >>> pages = tree.insert(ids, pool.take(2))
    >>> pool.release(pages), tree.match(np.array([0, 1, 2, 9])) == pages[:1], tree.match(ids) == pages
    (None, True, True)
    >>> tree.evict(4), pool.free
    (2, 4)
    """

    def __init__(self, pool: PagePool):
        self.pool = pool
        self._page: OrderedDict[tuple[int, bytes], int] = OrderedDict()  # the longest unused first, a child before its parent
        self._children = np.zeros(pool.count, np.int32)

    def __len__(self) -> int:
        return len(self._page)

    def _edges(self, ids: np.ndarray) -> List[bytes]:
        size = self.pool.size
        ids = np.ascontiguousarray(ids[:len(ids) // size * size], np.int64)
        whole, step = ids.tobytes(), 8 * size
        return [whole[i:i + step] for i in range(0, len(whole), step)]

    def match(self, ids: np.ndarray) -> List[int]:
        """The pages of the longest known beginning of these tokens, whole pages of them; they are not held for the caller."""
        parent, path = -1, []
        for edge in self._edges(ids):
            page = self._page.get((parent, edge))
            if page is None:
                break
            path.append((parent, edge))
            parent = page
        pages = [self._page[key] for key in path]
        self._touch(path)
        return pages

    def insert(self, ids: np.ndarray, pages: Sequence[int]) -> List[int]:
        """Remember the tokens' full pages. Returns the tree's own: where it had one of the same tokens, that, of which the caller is
        a holder from now on instead of the page given."""
        parent, path, own, new = -1, [], [], []
        for edge, page in zip(self._edges(ids), pages):
            key, page = (parent, edge), int(page)
            known = self._page.get(key)
            if known is None:
                self._page[key] = page
                new.append(page)
                if parent >= 0:
                    self._children[parent] += 1
            elif known != page:
                self.pool.share([known])
                self.pool.release([page])
                page = known
            path.append(key)
            own.append(page)
            parent = page
        self.pool.share(new)
        self._touch(path)
        return own

    def _touch(self, path: List[tuple[int, bytes]]) -> None:
        for key in reversed(path):
            self._page.move_to_end(key)

    def evict(self, count: int) -> int:
        """Free up to ``count`` pages that nobody but the tree holds, the longest unused first; returns how many."""
        gone = []
        for key, page in self._page.items():
            if len(gone) >= count:
                break
            if self.pool.refs[page] == 1 and not self._children[page]:
                gone.append((key, page))
                if key[0] >= 0:
                    self._children[key[0]] -= 1
        for key, page in gone:
            del self._page[key]
        self.pool.release([page for _, page in gone])
        return len(gone)

    def clear(self) -> None:
        """Forget everything: the pages' keys and values are no longer the model's."""
        pages = list(self._page.values())
        self._page.clear()
        self._children[:] = 0
        self.pool.release(pages)
