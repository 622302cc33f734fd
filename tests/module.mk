# tests/: unit (criterion, mirrors the sources), integration (real daemon, real sockets), e2e (the real model), bench, fuzz.
UNIT_PC := criterion
UNIT_SRC := $(wildcard tests/unit/*.c tests/unit/*/*.c)
UNIT_OBJ := $(UNIT_SRC:%.c=$(BUILD)/obj/%.o)
$(BUILD)/obj/tests/%.o: DEPS_CFLAGS = $(shell pkg-config --cflags $(UNIT_PC) $(DAEMON_PC) $(CLIENT_PC) $(BKV_PC))
$(UNIT_OBJ): | $(PROTO_HDR)
