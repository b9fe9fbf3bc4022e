// Loads an artefact and writes greedily, with TVM's runtime libraries alone: no Python, no compiler, no torch.
//
//   F=$(python -c "import tvm_ffi, os; print(os.path.dirname(tvm_ffi.__file__))")
//   R=$(python -c "from importlib.util import find_spec; print(find_spec('tvm').submodule_search_locations[0])")
//   g++ -std=c++17 -O2 -I$F/include examples/generate.cc -o generate -L$F/lib -L$R/lib \
//       -Wl,--no-as-needed -ltvm_runtime -ltvm_ffi -Wl,-rpath,$F/lib:$R/lib
//   ./generate OUT 16 5 17 42          16 tokens after the prompt 5 17 42
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;
namespace json = tvm::ffi::json;
using Object = ffi::Map<ffi::Any, ffi::Any>;

// 64-byte aligned host memory, zeroed: a sequence starts from zero state.
struct HostMemory {
  void AllocData(DLTensor* tensor) {
    size_t size = (ffi::GetDataSize(*tensor) + 63) / 64 * 64;
    tensor->data = std::aligned_alloc(64, size ? size : 64);
    std::memset(tensor->data, 0, size);
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

ffi::Tensor Allocate(const std::vector<int64_t>& shape, const std::string& dtype) {
  return ffi::Tensor::FromNDAlloc(HostMemory(), ffi::Shape(shape), ffi::StringToDLDataType(dtype), DLDevice{kDLCPU, 0});
}

json::Value ReadJson(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error("cannot read " + path);
  std::stringstream text;
  text << file.rdbuf();
  return json::Parse(text.str());
}

json::Value At(const json::Value& object, const std::string& key) { return object.cast<Object>()[ffi::String(key)]; }

template <typename T>
T Get(const json::Value& object, const std::string& key) {
  return At(object, key).cast<T>();
}

// A shape as the artefact writes it; the dimension "context" is the cache length this program chose.
std::vector<int64_t> ReadShape(const json::Value& dims, int64_t context) {
  std::vector<int64_t> shape;
  for (const ffi::Any& dim : dims.cast<ffi::Array<ffi::Any>>()) {
    auto number = dim.try_cast<int64_t>();
    shape.push_back(number ? *number : context);
  }
  return shape;
}

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: generate OUT COUNT ID [ID ...]\n";
    return 2;
  }
  const std::string out = argv[1];
  const int count = std::atoi(argv[2]);
  std::vector<int32_t> prompt;
  for (int i = 3; i < argc; ++i) prompt.push_back(std::atoi(argv[i]));
  const int64_t context = static_cast<int64_t>(prompt.size()) + count;

  json::Value facts = ReadJson(out + "/tvm_sparse.json");

  // A parameter's buffers by the names the library knows: the parameter's own, or parameter.buffer.
  std::map<std::string, ffi::Tensor> buffers;
  for (const auto& [name, param] : At(ReadJson(out + "/params.json"), "params").cast<Object>()) {
    std::ifstream file(out + "/" + std::string(Get<ffi::String>(param, "file")), std::ios::binary);
    for (const auto& [part, entry] : At(param, "buffers").cast<Object>()) {
      const std::string suffix = part.cast<ffi::String>(), full = name.cast<ffi::String>();
      ffi::Tensor tensor = Allocate(ReadShape(At(entry, "shape"), 0), Get<ffi::String>(entry, "dtype"));
      file.seekg(Get<int64_t>(entry, "offset"));
      if (!file.read(static_cast<char*>(tensor.data_ptr()), Get<int64_t>(entry, "bytes"))) {
        throw std::runtime_error("cannot read " + full);
      }
      buffers.insert_or_assign(suffix.empty() ? full : full + "." + suffix, tensor);
    }
  }

  ffi::Array<ffi::Any> params, state;
  for (const ffi::Any& name : Get<ffi::Array<ffi::Any>>(facts, "params")) {
    params.push_back(buffers.at(std::string(name.cast<ffi::String>())));
  }
  for (const ffi::Any& item : Get<ffi::Array<ffi::Any>>(facts, "state")) {
    state.push_back(Allocate(ReadShape(At(item, "shape"), context), Get<ffi::String>(item, "dtype")));
  }

  ffi::Module library = ffi::Module::LoadFromFile(out + "/lib.so");
  ffi::Module vm = library->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
  vm->GetFunction("vm_initialization").value()(1, 0, 2);  // CPU, device 0, pooled allocator
  ffi::Function prefill = vm->GetFunction("prefill").value(), decode = vm->GetFunction("decode").value();

  ffi::Tensor ids = Allocate({static_cast<int64_t>(prompt.size())}, "int32"), id = Allocate({1}, "int32");
  ffi::Tensor slot = Allocate({1}, "int32"), position = Allocate({Get<int64_t>(facts, "batch")}, "int32");
  std::copy(prompt.begin(), prompt.end(), static_cast<int32_t*>(ids.data_ptr()));

  ffi::Tensor logits = prefill(ids, slot, position, state, params).cast<ffi::Tensor>();
  for (int i = 0; i < count; ++i) {
    const float* first = static_cast<const float*>(logits.data_ptr());
    const int32_t next = std::max_element(first, first + logits.size(1)) - first;
    std::cout << next << (i + 1 < count ? " " : "\n");
    *static_cast<int32_t*>(id.data_ptr()) = next;
    if (i + 1 < count) logits = decode(id, slot, position, state, params).cast<ffi::Tensor>();
  }
  return 0;
}
