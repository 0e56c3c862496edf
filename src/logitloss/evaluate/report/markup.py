"""Elements of a page, made by one function; the standard library writes them, and escapes what they hold."""

from typing import Any
from xml.etree import ElementTree

Element = ElementTree.Element
CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n\r"}


def element(name: str, /, *children: "Element | str | None", **attributes: Any) -> Element:
    """Return an element of elements and text; `class_` and `data_x` are the attributes class and data-x."""
    made = Element(name)
    for key, value in attributes.items():
        if value is not None:
            made.set(key.rstrip("_").replace("_", "-"), plain(value))
    last = None
    for child in children:
        if isinstance(child, Element):
            made.append(child)
            last = child
        elif child is not None and last is None:
            made.text = (made.text or "") + plain(child)
        elif child is not None and last is not None:
            last.tail = (last.tail or "") + plain(child)
    return made


def plain(value: Any) -> str:
    """Return the text of a key or a name, which may hold bytes that are no text, and control characters."""
    return str(value).encode("utf-8", "backslashreplace").decode().translate(CONTROLS)


def table(head: list[str], rows: list[list[Any]], **attributes: Any) -> Element:
    """Return a table, the first cell of each row its heading, in a box that scrolls if it is too wide."""
    columns = element("tr", *(element("th", text, scope="col") for text in head))
    lines = [
        element("tr", element("th", cells[0], scope="row"), *(element("td", cell) for cell in cells[1:]))
        for cells in rows
    ]
    whole = element("table", element("thead", columns), element("tbody", *lines), **attributes)
    return element("div", whole, class_="scrolls", tabindex="0")


def written(root: Element) -> str:
    """Return the whole page as HTML."""
    return "<!doctype html>\n" + ElementTree.tostring(root, encoding="unicode", method="html") + "\n"
