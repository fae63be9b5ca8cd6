// Answers raw float32 rows with an artifact's model.ts, in C++ alone.
//
//   answer MODEL.ts ROWS.f32 DIMENSIONS PROBABILITIES.f32 EXITS.i64 [THRESHOLDS]
//
// DIMENSIONS such as 32,1,8,8, the batch first; THRESHOLDS such as 0.7,inf, one per exit but the last.

#include <torch/script.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

namespace {

template <typename Number>
std::vector<Number> numbers(const std::string& text, Number (*parse)(const std::string&)) {
    std::vector<Number> found;
    std::stringstream stream(text);
    for (std::string part; std::getline(stream, part, ',');) found.push_back(parse(part));
    return found;
}

void write(const char* path, const torch::Tensor& tensor) {
    const torch::Tensor whole = tensor.contiguous();
    std::ofstream(path, std::ios::binary).write(static_cast<const char*>(whole.data_ptr()), whole.nbytes());
}


void answer(int argc, char** argv) {
    const c10::InferenceMode inference;
    torch::jit::Module model = torch::jit::load(argv[1]);

    std::ifstream file(argv[2], std::ios::binary);
    std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    const auto dimensions = numbers<int64_t>(argv[3], [](const std::string& s) -> int64_t { return std::stoll(s); });
    const torch::Tensor rows = torch::from_blob(bytes.data(), dimensions, torch::kFloat32);

    if (argc == 7) {
        const auto limits = numbers<float>(argv[6], [](const std::string& s) { return std::stof(s); });
        model.get_method("set_thresholds")({torch::tensor(limits)});
    }
    const auto answers = model.forward({rows}).toTuple();
    write(argv[4], answers->elements()[0].toTensor());  // probabilities [B, K] float32
    write(argv[5], answers->elements()[1].toTensor());  // exit [B] int64
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 6 && argc != 7) {
        std::cerr << "usage: answer MODEL.ts ROWS.f32 DIMENSIONS PROBABILITIES.f32 EXITS.i64 [THRESHOLDS]\n";
        return 2;
    }
    try {
        answer(argc, argv);
    } catch (const std::exception& error) {
        std::cerr << error.what() << "\n";
        return 1;
    }
    return 0;
}
