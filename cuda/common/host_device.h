// Marks functions that host and device code share, so that plain C++ compilers can read them too.
#pragma once

#ifdef __CUDACC__
#define JAXSPARSE_HD __host__ __device__ __forceinline__
#else
#define JAXSPARSE_HD inline
#endif
