# The site: `make docs` builds docs/_build/html and serves it at http://localhost:8000.
.PHONY: docs html linkcheck

docs: html
	python -m http.server --bind 127.0.0.1 --directory docs/_build/html 8000

html:
	python -m sphinx --builder html --fail-on-warning --fresh-env docs docs/_build/html

# Needs the network.
linkcheck:
	python -m sphinx --builder linkcheck docs docs/_build/linkcheck
