#pragma once

#include "model.h"

// The words of errors.
namespace bn::simt {

struct Block;
struct Thread;

std::string text_of(Site site);
std::string text_of(const Thread& thread);
std::string text_of(const std::vector<Block>& blocks);

}  // namespace bn::simt
