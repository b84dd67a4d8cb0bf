// The plain C interface of the compiled CPU library.
#define NIN_API extern "C" __attribute__((visibility("default")))

// The version of the package that the library was built from; Python refuses a library of another version.
NIN_API const char* nin_version() { return NIN_VERSION; }
