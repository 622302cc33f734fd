# balancekvd: `make demo` shows it, `make test` proves it, `make help` lists the rest.
#
# Each room declares its own part in <room>/module.mk; deploy/setup.sh brings the packages that deploy/packages.txt names.

VERSION := 0.1.0
PREFIX ?= /usr/local
DESTDIR ?=
BUILD ?= build

CC = gcc
CSTD = -std=c11 -D_GNU_SOURCE
WARN = -Wall -Wextra -Wconversion -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wundef -Wvla -Werror
OPT ?= -O2 -g
SAN ?=
CPPFLAGS = -I. -Ikernels -I$(BUILD)/proto -DBKV_VERSION='"$(VERSION)"'
CFLAGS = $(CSTD) $(WARN) $(OPT) $(SAN) -fPIC -fno-omit-frame-pointer -fvisibility=hidden -fstack-protector-strong -pthread
LDFLAGS = $(SAN) -pthread -pie -Wl,--as-needed -Wl,-z,relro -Wl,-z,now

# Asking pkg-config about gRPC takes 0.4 s, so each question is asked once, when first needed (after `make setup`).
once = $(if $($(1)),,$(eval $(1) := $(shell $(2)) ))$($(1))
cflags_of = $(call once,CFLAGS_OF_$(subst $() ,_,$(strip $(1))),pkg-config --cflags $(1))
libs_of = $(call once,LIBS_OF_$(subst $() ,_,$(strip $(1))),pkg-config --libs $(1))

# `make V=1` shows whole command lines.
Q = $(if $(V),,@)
say = $(if $(V),,@echo "  $(1)  $(2)")

.DEFAULT_GOAL := all
# As many jobs as there are CPUs, unless the caller says otherwise.
ifeq ($(MAKELEVEL),0)
MAKEFLAGS += -j$(shell nproc)
endif
.DELETE_ON_ERROR:
.SECONDARY:

include kernels/module.mk proto/module.mk daemon/module.mk client/module.mk deploy/module.mk tests/module.mk

.PHONY: all help clean
## all: the daemon, the command line and the client library
all: kernels daemon client
help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST) | sort | awk -F': ' '{printf "  make %-16s %s\n", $$1, $$2}'
clean:
	rm -rf $(BUILD)

# One rule for every C file of ours; generated protobuf code has its own, laxer one in proto/module.mk.
$(BUILD)/obj/%.o: %.c
	$(call say,CC ,$<)
	@mkdir -p $(@D)
	$(Q)$(CC) $(CPPFLAGS) $(DEPS_CFLAGS) $(CFLAGS) $(FILE_CFLAGS) -MMD -MP -c $< -o $@

-include $(shell find $(BUILD)/obj -name '*.d' 2>/dev/null)
