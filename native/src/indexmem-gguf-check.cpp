#include "indexmem-gguf-check.h"

#include "indexer.h"

#include "llama-impl.h"
#include "llama-mmap.h"

#include <algorithm>
#include <cstring>
#include <unordered_set>

static constexpr uint64_t FILE_MAX    = 16ull << 30;
static constexpr uint64_t HEADER_MAX  = 16ull << 20; // 4096 layers of the largest kind take 4 MiB
static constexpr uint64_t KEYS_MAX    = 4096;
static constexpr uint64_t KEY_MAX     = 65535;       // as GGUF says
static constexpr uint64_t TENSORS_MAX = 65536;
static constexpr uint32_t ALIGN_MIN   = 8;           // as GGUF says
static constexpr uint32_t ALIGN_MAX   = 65536;

std::string indexmem_printable(const std::string & text) {
    constexpr size_t n_max = 80;

    std::string res;
    for (const char c : text) {
        std::string piece(1, c);
        if (c == '\\') {
            piece = "\\\\";
        } else if (c < 0x20 || c > 0x7E) {
            piece = format("\\x%02x", (unsigned) (unsigned char) c);
        }
        if (res.size() + piece.size() > n_max - 3) {
            return res + "...";
        }
        res += piece;
    }
    return res;
}

size_t indexmem_gguf_value_size(int32_t type) {
    switch (type) {
        case GGUF_TYPE_UINT8:
        case GGUF_TYPE_INT8:
        case GGUF_TYPE_BOOL:
            return 1;
        case GGUF_TYPE_UINT16:
        case GGUF_TYPE_INT16:
            return 2;
        case GGUF_TYPE_UINT32:
        case GGUF_TYPE_INT32:
        case GGUF_TYPE_FLOAT32:
            return 4;
        case GGUF_TYPE_UINT64:
        case GGUF_TYPE_INT64:
        case GGUF_TYPE_FLOAT64:
            return 8;
        default:
            return 0;
    }
}

namespace {

[[noreturn]] void damaged(const std::string & what) {
    throw indexmem_sidecar_error(what + ": the file is damaged, get or convert it again");
}

class header_reader {
public:
    explicit header_reader(llama_file & file) : file(file), size(file.size()) {
        if (size > FILE_MAX) {
            throw indexmem_sidecar_error(format("it has %llu bytes, a sidecar has at most %llu",
                        (unsigned long long) size, (unsigned long long) FILE_MAX));
        }
    }

    std::vector<uint8_t> read() {
        magic();
        const uint64_t n_tensors = count("tensors", TENSORS_MAX);
        const uint64_t n_keys    = count("keys",    KEYS_MAX);
        for (uint64_t i = 0; i < n_keys; ++i) {
            key();
        }
        for (uint64_t i = 0; i < n_tensors; ++i) {
            tensor();
        }
        if (n_tensors > 0) {
            const uint64_t n_pad = (align - pos % align) % align;
            skip(n_pad, "the padding before its tensors");
        }
        if (data_end > size - pos) {
            damaged(format("its tensors end at byte %llu, and it has %llu bytes",
                        (unsigned long long) (pos + data_end), (unsigned long long) size));
        }
        bytes.resize(pos);
        return std::move(bytes);
    }

private:
    // makes n bytes from `pos` on available
    void need(uint64_t n, const char * what) {
        if (n > size - pos) {
            damaged(format("it ends within %s (at byte %llu, %llu more are needed)", what,
                        (unsigned long long) size, (unsigned long long) (n - (size - pos))));
        }
        if (n > HEADER_MAX - pos) {
            throw indexmem_sidecar_error(format("its header has more than %llu bytes, at %s: no sidecar needs that many",
                        (unsigned long long) HEADER_MAX, what));
        }
        if (pos + n > bytes.size()) {
            constexpr uint64_t step = 64*1024;
            const size_t n_old = bytes.size();
            bytes.resize(std::min(std::max(pos + n, n_old + step), size));
            file.read_raw(bytes.data() + n_old, bytes.size() - n_old);
        }
    }

    void skip(uint64_t n, const char * what) {
        need(n, what);
        pos += n;
    }

    template <typename T>
    T get(const char * what) {
        T res;
        need(sizeof(res), what);
        memcpy(&res, bytes.data() + pos, sizeof(res));
        pos += sizeof(res);
        return res;
    }

    std::string text(const char * what) {
        const uint64_t n = get<uint64_t>(what);
        need(n, what);
        const std::string res((const char *) bytes.data() + pos, n);
        pos += n;
        if (res.find('\0') != std::string::npos) { // C strings would end here, and so differ from what others read
            damaged(format("a zero byte in %s ('%s')", what, indexmem_printable(res).c_str()));
        }
        return res;
    }

    void magic() {
        if (size == 0) {
            throw indexmem_sidecar_error("the file is empty");
        }
        const uint64_t n = std::min<uint64_t>(size, strlen(GGUF_MAGIC));
        need(n, "its first bytes");
        const std::string found((const char *) bytes.data(), n);
        pos = n;
        if (found != GGUF_MAGIC) {
            throw indexmem_sidecar_error(format("not a GGUF file: it starts with '%s', expected '" GGUF_MAGIC "'; is it a checkpoint "
                        "that indexmem-convert has yet to convert?", indexmem_printable(found).c_str()));
        }
        const uint32_t version = get<uint32_t>("its version");
        if (version != 0 && (version & 0xFFFF) == 0) {
            throw indexmem_sidecar_error("a GGUF file of the other byte order: convert it again on this machine");
        }
        if (version < 2 || version > GGUF_VERSION) {
            throw indexmem_sidecar_error(format("version %u of GGUF, expected 2 or %d: %s", version, GGUF_VERSION,
                        version < 2 ? "convert it again" : "update indexmem-edge"));
        }
    }

    uint64_t count(const char * what, uint64_t max) {
        const uint64_t n = get<uint64_t>("its counts");
        if (n > max) {
            damaged(format("it claims %llu %s, at most %llu are possible", (unsigned long long) n, what, (unsigned long long) max));
        }
        return n;
    }

    void key() {
        const std::string name = text("a key");
        if (name.empty() || name.size() > KEY_MAX) {
            damaged(format("a key has a name of %zu bytes", name.size()));
        }
        const std::string shown = indexmem_printable(name);
        if (!keys.insert(name).second) {
            damaged(format("key '%s' is there twice", shown.c_str()));
        }

        int32_t  type     = get<int32_t>("the type of a key");
        bool     is_array = false;
        uint64_t n        = 1;
        if (type == GGUF_TYPE_ARRAY) {
            is_array = true;
            type     = get<int32_t> ("the type of an array");
            n        = get<uint64_t>("the length of an array");
        }
        if (type != GGUF_TYPE_STRING && indexmem_gguf_value_size(type) == 0) {
            damaged(format("key '%s' has a value of type %d, which does not exist", shown.c_str(), type));
        }
        const uint64_t n_bytes = type == GGUF_TYPE_STRING ? sizeof(uint64_t) : indexmem_gguf_value_size(type); // of each, at least
        if (n > (size - pos)/n_bytes) {
            damaged(format("key '%s' claims %llu values, more than the file holds", shown.c_str(), (unsigned long long) n));
        }

        if (name == GGUF_KEY_GENERAL_ALIGNMENT) {
            if (is_array || type != GGUF_TYPE_UINT32) {
                damaged("key '" GGUF_KEY_GENERAL_ALIGNMENT "' is not u32");
            }
            align = get<uint32_t>("the alignment");
            if (align < ALIGN_MIN || align > ALIGN_MAX || (align & (align - 1)) != 0) {
                damaged(format("an alignment of %u, expected a power of two from %u to %u", align, ALIGN_MIN, ALIGN_MAX));
            }
        } else if (type == GGUF_TYPE_STRING) {
            for (uint64_t i = 0; i < n; ++i) {
                text("the text of a key");
            }
        } else {
            skip(n*n_bytes, "the value of a key");
        }
    }

    void tensor() {
        const std::string name = text("the name of a tensor");
        const std::string shown = indexmem_printable(name);
        if (name.empty() || name.size() >= GGML_MAX_NAME) {
            damaged(format("a tensor has a name of %zu bytes ('%s'), expected 1 to %d", name.size(), shown.c_str(), GGML_MAX_NAME - 1));
        }
        if (!tensors.insert(name).second) {
            damaged(format("tensor '%s' is there twice", shown.c_str()));
        }

        const uint32_t n_dims = get<uint32_t>("the shape of a tensor");
        if (n_dims < 1 || n_dims > GGML_MAX_DIMS) {
            damaged(format("tensor '%s' has %u dimensions, expected 1 to %d", shown.c_str(), n_dims, GGML_MAX_DIMS));
        }
        uint64_t ne[GGML_MAX_DIMS] = { 1, 1, 1, 1 };
        for (uint32_t i = 0; i < n_dims; ++i) {
            ne[i] = get<uint64_t>("the shape of a tensor");
        }

        const int32_t type = get<int32_t>("the type of a tensor");
        if (type < 0 || type >= GGML_TYPE_COUNT || ggml_blck_size((ggml_type) type) == 0) {
            damaged(format("tensor '%s' has type %d, which does not exist", shown.c_str(), type));
        }
        const uint64_t n_block = ggml_blck_size((ggml_type) type);
        if (ne[0] % n_block != 0) {
            damaged(format("tensor '%s' has rows of %llu values, expected a multiple of %llu", shown.c_str(),
                        (unsigned long long) ne[0], (unsigned long long) n_block));
        }

        // never larger than the file, so nothing overflows
        uint64_t n_bytes = ggml_type_size((ggml_type) type);
        ne[0] /= n_block;
        for (uint64_t n : ne) {
            if (n == 0) {
                damaged(format("tensor '%s' has no values", shown.c_str()));
            }
            if (n > size/n_bytes) {
                damaged(format("tensor '%s' would be larger than the file", shown.c_str()));
            }
            n_bytes *= n;
        }

        const uint64_t offset   = get<uint64_t>("the offset of a tensor");
        const uint64_t expected = (data_end + align - 1)/align*align;
        if (offset != expected) {
            damaged(format("tensor '%s' lies at offset %llu, expected %llu (each follows the one before, aligned to %u)",
                        shown.c_str(), (unsigned long long) offset, (unsigned long long) expected, align));
        }
        data_end = offset + n_bytes;
        if (data_end > size) {
            damaged(format("tensor '%s' ends after the file", shown.c_str()));
        }
    }

    llama_file & file;

    const uint64_t size;

    std::vector<uint8_t> bytes; // read so far
    uint64_t pos      = 0;
    uint64_t data_end = 0; // of the last tensor, from the start of the data
    uint32_t align    = GGUF_DEFAULT_ALIGNMENT;

    std::unordered_set<std::string> keys;
    std::unordered_set<std::string> tensors;
};

} // namespace

std::vector<uint8_t> indexmem_gguf_header(llama_file & file) {
    return header_reader(file).read();
}
