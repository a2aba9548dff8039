#pragma once

#include "core/activation.h"
#include "core/numbers.h"
#include "core/problem.h"

#include <algorithm>

// A call without its pointers: what each of its stages reads, writes and holds. A plan follows from it.
namespace bn {

// The size of the branch bits of this many elements: whole words of 32 bits.
template <class Size>
BN_HD constexpr Size branch_bytes(const Size& elements) {
  return (elements + 31) / 32 * 4;
}

BN_HD constexpr bool fills_branch_words(int64_t elements) {
  return elements % 32 == 0;
}

enum class Direction : int { Forward, Backward };

// The stages of a batch norm that a pass runs. A reduction alone gives statistics or sums; an application alone is
// given them.
enum class Stages : int { All, Reduce, Apply };

// The residual and the activation behind the normalization, as a pass reads and writes them.
struct Chain {
  ActivationKind activation = ActivationKind::Identity;
  bool residual = false;  // is read
  bool branches = false;  // a forward writes the branches, a backward reads them instead of z's inputs

  bool operator==(const Chain&) const = default;
};

// The gradients that a backward writes.
struct Wants {
  bool dx = false;
  bool dresidual = false;
  bool dweight = false;
  bool dbias = false;

  bool operator==(const Wants&) const = default;
};

// A number of tensors, and whether branch bits are moved too.
struct Traffic {
  int tensors = 0;
  bool branches = false;

  bool operator==(const Traffic&) const = default;
};

// Without an activation and a mask dresidual is dy itself, and no kernel writes it.
BN_HD constexpr bool dresidual_is_dy(ActivationKind activation, bool masked = false) {
  return activation == ActivationKind::Identity && !masked;
}

// The chain of a backward. Only an activation makes it read anything. Where one bit per element tells the branch of z,
// branch bits are read if they spare a tensor: the residual, or the input of a frozen layer, which has constant
// statistics and no gradient of its weight.
inline Chain backward_chain(ActivationKind activation, bool residual, bool frozen = false) {
  const bool curved = activation != ActivationKind::Identity && !has_branches({activation});
  return {activation, residual && curved, (residual || frozen) && has_branches({activation})};
}

struct Pass {
  Problem problem;
  Direction direction = Direction::Forward;
  bool training = true;
  Wants wants;  // backward only
  Chain chain;
  Stages stages = Stages::All;
  bool masked = false;

  bool operator==(const Pass&) const = default;

  bool reduces() const { return reduce_reads().tensors > 0; }
  bool applies() const { return writes().tensors > 0; }

  // Whether dx depends on the sums, because the statistics depend on x.
  bool through_statistics() const { return !forward() && training && wants.dx; }

  // Whether the sums of the mask are needed: for the moments, or for the part of dx that goes through them.
  bool counts_masked() const {
    return masked && (forward() ? reduces() : through_statistics() && stages == Stages::All);
  }

  // The reduction reads the first tensors of (x, residual) in a forward, of (dy, x, residual) in a backward.
  Traffic reduce_reads() const {
    if (stages == Stages::Apply) {
      return {};
    }
    if (forward()) {
      return {training ? 1 : 0, false};
    }
    const bool with_x = through_statistics() || wants.dweight || stages == Stages::Reduce;
    return with_x || wants.dbias ? reads_of_dz(with_x) : Traffic{};
  }

  // To write the outputs, the first tensors of the same lists are read.
  Traffic apply_reads() const {
    if (!applies()) {
      return {};
    }
    return forward() ? Traffic{chain.residual ? 2 : 1, false} : reads_of_dz(through_statistics());
  }

  // A forward may hold x between the stages. A backward may hold dz and, if dx needs it, x.
  int holds() const { return !applies() ? 0 : through_statistics() ? 2 : 1; }

  // The part of apply_reads that is not read again for a held element. dz is made of all that a backward reads.
  Traffic spared_by_holding() const { return forward() ? Traffic{1, false} : apply_reads(); }

  Traffic writes() const {
    if (stages == Stages::Reduce) {
      return {};
    }
    return forward() ? Traffic{1, chain.branches} : Traffic{(wants.dx ? 1 : 0) + (wants.dresidual ? 1 : 0), false};
  }

  // The most that a pass of this direction holds. Channels are cut by this number, not by holds(), so that the bits of
  // a sum do not depend on what else is wanted.
  int most_held() const { return forward() ? 1 : 2; }

  // Whether channels are cut for the bytes of branch bits. Where it reduces, chain.branches does not matter, so that
  // the bits of the statistics do not depend on whether branch bits are kept.
  bool may_write_branches() const {
    return forward() && has_branches({chain.activation}) && (chain.residual || (chain.branches && !reduces()));
  }

 private:
  bool forward() const { return direction == Direction::Forward; }

  // The tensors and bits that dz is made of, and x if it is needed besides.
  Traffic reads_of_dz(bool with_x) const {
    const bool needs_z = !chain.branches && chain.activation != ActivationKind::Identity;
    const int for_dz = !needs_z ? 1 : chain.residual ? 3 : 2;
    return {std::max(for_dz, with_x ? 2 : 1), chain.branches};
  }
};

}  // namespace bn
