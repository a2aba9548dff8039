// Errors that the compiler's checks find: in a kernel they end the launch like any other error, elsewhere the process.

#include "scheduler.h"

#include <cstdio>
#include <cstdlib>
#include <sstream>

#ifdef BN_SIMT_SANITIZE
#include <sanitizer/asan_interface.h>
#endif

namespace bn::simt {
namespace {

// -fsanitize=alignment,null passes this to its handler. The handler below replaces the compiler's runtime library.
struct TypeMismatch {
  const char* file;
  uint32_t line;
  uint32_t column;
  const void* type;
  unsigned char log_alignment;
  unsigned char kind;
};

extern "C" void __ubsan_handle_type_mismatch_v1(const TypeMismatch* at, uintptr_t address) {
  std::ostringstream what;
  what << "address 0x" << std::hex << address << std::dec << " is "
       << (address == 0 ? "null" : "no multiple of " + std::to_string(1 << at->log_alignment)) << " (" << at->file
       << ":" << at->line << ")";
  if (residents == nullptr) {
    std::fprintf(stderr, "%s\n", what.str().c_str());
    std::abort();
  }
  residents->fail(what.str());
}

#ifdef BN_SIMT_SANITIZE
// Called in the middle of an access. The access goes on, and so does the kernel until its next barrier.
void on_report(const char* report) {
  if (residents == nullptr) {
    std::abort();
  }
  std::string essence;
  std::istringstream lines(report);
  for (std::string line; std::getline(lines, line);) {
    const auto says = [&](const char* part) { return line.find(part) != line.npos; };
    if (says("ERROR: ") || says(" of size ") || says("#0 ") || says(" is located ")) {
      essence += "\n" + line;
    }
    if (says(" is located ")) {
      break;
    }
  }
  std::fprintf(stderr, "%s\n", residents->where().c_str());  // in case the error ends the process
  residents->report(essence);
}
#endif

}  // namespace

void listen_to_sanitizer() {
#ifdef BN_SIMT_SANITIZE
  __asan_set_error_report_callback(on_report);
#endif
}

}  // namespace bn::simt
