venv: .venv/.installed

.venv/.installed: pyproject.toml
	/usr/bin/python3 -m venv --system-site-packages .venv
	.venv/bin/python -m pip install --quiet -e '.[lab,dev]'
	touch $@
.PHONY: venv
