#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

// Values as text.
namespace bn {

// A named value of a struct. Booleans and text print as in Python.
struct Field {
  const char* name;
  std::string value;

  Field(const char* name, const char* value) : name(name), value("'" + std::string(value) + "'") {}
  Field(const char* name, bool value) : name(name), value(value ? "True" : "False") {}
  Field(const char* name, int value) : name(name), value(std::to_string(value)) {}
  Field(const char* name, int64_t value) : name(name), value(std::to_string(value)) {}
};

inline std::string fields(std::initializer_list<Field> all) {
  std::string text;
  for (const Field& field : all) {
    text += (text.empty() ? "" : ", ") + std::string(field.name) + "=" + field.value;
  }
  return text;
}

}  // namespace bn
