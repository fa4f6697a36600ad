// What the search shows of a page is from its article, not from what stands around it.
const textOf = Search.htmlToText;
Search.htmlToText = (html, anchor) => {
  const page = new DOMParser().parseFromString(html, "text/html");
  const article = page.querySelector("article");
  return textOf(article ? `<div role="main">${article.outerHTML}</div>` : html, anchor);
};

// A table that is wider than the text may reach into the margin. The theme folds
// "Contents" there while anything of this class is in sight.
for (const table of document.querySelectorAll(".bd-article table")) {
  if (table.scrollWidth > table.clientWidth) table.classList.add("full-width");
}
