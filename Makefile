# Every target is one call of infra/setup.py, which says what it does and why it failed.
PYTHON ?= python3
SETUP = @$(PYTHON) infra/setup.py

.DEFAULT_GOAL := help
.PHONY: demo test up down status check test-full test-gpu bench lock clean help

demo:       ; $(SETUP) demo $(ARGS)       ## install, start everything, and run one job from code to a served model
test:       ; $(SETUP) test $(ARGS)       ## run the tests: what CI runs
up:         ; $(SETUP) up $(ARGS)         ## start Nabla on this machine
down:       ; $(SETUP) down $(ARGS)       ## stop it; its data stay
status:     ; $(SETUP) status $(ARGS)     ## show what runs, where, and whether it is well
check:      ; $(SETUP) check $(ARGS)      ## lint, types, architecture, contracts, fast tests
test-full:  ; $(SETUP) test-full $(ARGS)  ## all tests, the slow and the chaos ones too
test-gpu:   ; $(SETUP) test-gpu $(ARGS)   ## the tests that need a GPU
bench:      ; $(SETUP) bench $(ARGS)      ## measure, and compare with the committed results
lock:       ; $(SETUP) lock               ## resolve newer versions into infra/locks (needs uv)
clean:      ; $(SETUP) clean              ## remove environments and caches; data in .nabla stay
help:       ; @sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r t d; do printf '%-18s %s\n' "$$t" "$$d"; done ## this list
