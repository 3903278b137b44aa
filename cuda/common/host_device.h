// JAXSPARSE_HD marks functions that host and device code share; plain C++ compilers accept it too.
#pragma once

#ifdef __CUDACC__
#define JAXSPARSE_HD __host__ __device__ __forceinline__
#else
#define JAXSPARSE_HD inline
#endif
