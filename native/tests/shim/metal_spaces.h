// The kernels as clang reads them, for their address spaces: a pointer of one is no pointer of another, and one without a
// word is of the thread. Declarations only, nothing is compiled; the attributes of the kernels are taken out before.

#define kernel
#define thread
#define device      __attribute__((address_space(1)))
#define constant    __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))

typedef signed char    int8_t;
typedef unsigned char  uint8_t, uchar;
typedef unsigned short uint16_t, ushort;
typedef int            int32_t;
typedef unsigned int   uint32_t, uint;
typedef unsigned long  uint64_t, ulong;
typedef _Float16       half;

typedef uint uint3 __attribute__((ext_vector_type(3)));
typedef uint uint4 __attribute__((ext_vector_type(4)));

template <typename To, typename From> To as_type(From);

namespace metal {

int   min(int, int);
int   max(int, int);
float max(float, float);

namespace precise {
float exp(float);
float log(float);
float sqrt(float);
float tanh(float);
} // namespace precise

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags);

float simd_sum(float);
float simd_min(float);
int   simd_min(int);
float simd_max(float);
float simd_broadcast(float, ushort);
uint  simd_prefix_exclusive_sum(uint);

struct atomic_uint { uint value; };
enum memory_order { memory_order_relaxed };
void atomic_store_explicit    (threadgroup atomic_uint *, uint, memory_order);
uint atomic_load_explicit     (threadgroup const atomic_uint *, memory_order);
uint atomic_fetch_add_explicit(threadgroup atomic_uint *, uint, memory_order);

} // namespace metal
