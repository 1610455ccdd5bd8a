// A block that scrolls sideways can be reached and scrolled with the keyboard.
function reach() {
  for (const block of document.querySelectorAll("pre, .table-wrapper, div.math, .cell_output .output"))
    if (block.scrollWidth > block.clientWidth) block.tabIndex = 0;
}
addEventListener("load", reach);
addEventListener("resize", reach);
