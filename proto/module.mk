# proto/: protobuf-c code made from the .proto files, never committed.
PROTO_SRC := $(wildcard proto/*.proto)
PROTO_GEN := $(PROTO_SRC:proto/%.proto=$(BUILD)/proto/%.pb-c.c)
PROTO_OBJ := $(PROTO_GEN:.c=.o)
PROTO_HDR := $(PROTO_GEN:.c=.h)

$(BUILD)/proto/%.pb-c.c $(BUILD)/proto/%.pb-c.h &: proto/%.proto
	@mkdir -p $(@D)
	protoc -Iproto --c_out=$(BUILD)/proto $<
$(BUILD)/proto/%.pb-c.o: $(BUILD)/proto/%.pb-c.c
	$(CC) $(CSTD) $(OPT) $(SAN) -fPIC -fvisibility=hidden -c $< -o $@
