// The module `vgpo_kernels._csrc`: kernels as Python functions, by the stable ABI.
//
// Arguments are what a kernel's signature says: a tensor is the tuple (address, type, *sizes, *strides), an absent one
// None; numbers are ints and floats. Counts, ranks and types are checked here, sizes by the kernel.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <array>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "capability.h"
#include "parallel.h"
#include "view.h"

namespace vgpo::portable {
#include "signatures.h"
}
#if defined(__x86_64__)
namespace vgpo::avx2 {
#include "signatures.h"
}
namespace vgpo::avx512 {
#include "signatures.h"
}
#endif

namespace {

using namespace vgpo;

// --- which target runs ---

const char* const CAPABILITIES[] = {"portable", "avx2", "avx512"};
int capability = 0;  // changed only while the interpreter is held

PyObject* get_capability(PyObject*, PyObject*) { return PyUnicode_FromString(CAPABILITIES[capability]); }

PyObject* capabilities(PyObject*, PyObject*) {
    PyObject* names = PyList_New(0);
    for (int i = 0; names && i <= best_capability(); ++i) {
        PyObject* name = PyUnicode_FromString(CAPABILITIES[i]);
        if (!name || PyList_Append(names, name) < 0) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

PyObject* set_capability(PyObject*, PyObject* name) {
    if (!PyUnicode_Check(name)) return PyErr_Format(PyExc_TypeError, "expected a str, got %R", name);
    for (int i = 0; i <= best_capability(); ++i) {
        const int differs = PyUnicode_CompareWithASCIIString(name, CAPABILITIES[i]);
        if (differs == 0) {
            capability = i;
            Py_RETURN_NONE;
        }
    }
    return PyErr_Format(PyExc_ValueError, "expected a capability that this processor has, up to '%s', got %R",
                        CAPABILITIES[best_capability()], name);
}

// --- threads ---

PyObject* set_parallel_for(PyObject*, PyObject* address) {
    const unsigned long long value = PyLong_AsUnsignedLongLong(address);
    if (PyErr_Occurred()) return nullptr;
    parallel_for = reinterpret_cast<ParallelFor>(static_cast<uintptr_t>(value));
    Py_RETURN_NONE;
}

// --- from Python to the types of a signature ---

struct Failed {};  // a Python error is set

[[noreturn]] void fail(PyObject* kind, const std::string& what) {
    PyErr_SetString(kind, what.c_str());
    throw Failed{};
}

int64_t integer(PyObject* object) {
    const long long value = PyLong_AsLongLong(object);
    if (value == -1 && PyErr_Occurred()) throw Failed{};
    return value;
}

template <int N>
std::array<int64_t, 2 + 2 * N> tensor_fields(PyObject* object) {
    if (!PyTuple_Check(object) || PyTuple_Size(object) != 2 + 2 * N)
        fail(PyExc_TypeError, "expected a tensor of " + std::to_string(N) + " dimensions");
    std::array<int64_t, 2 + 2 * N> fields;
    for (int i = 0; i < 2 + 2 * N; ++i) fields[i] = integer(PyTuple_GetItem(object, i));
    for (int d = 0; d < N; ++d)
        if (fields[2 + d] < 0) fail(PyExc_ValueError, "expected sizes of at least 0");
    return fields;
}

// An address must be aligned for its type, and not 0, as that of a tensor whose memory was freed is.
template <int N>
void check_address(const std::array<int64_t, 2 + 2 * N>& fields, int64_t item_size) {
    bool empty = false;
    for (int d = 0; d < N; ++d) empty = empty || fields[2 + d] == 0;
    if (!empty && fields[0] == 0) fail(PyExc_ValueError, "expected a tensor with memory");
    if (fields[0] % item_size) fail(PyExc_ValueError, "expected an address that is a multiple of the element's size");
}

template <class T>
struct Argument;

template <>
struct Argument<int64_t> {
    static int64_t from(PyObject* object) { return integer(object); }
};
template <>
struct Argument<bool> {
    static bool from(PyObject* object) { return integer(object) != 0; }
};
template <>
struct Argument<double> {
    static double from(PyObject* object) {
        const double value = PyFloat_AsDouble(object);
        if (value == -1.0 && PyErr_Occurred()) throw Failed{};
        return value;
    }
};
template <class T, int N>
struct Argument<View<T, N>> {
    static View<T, N> from(PyObject* object) {
        const auto fields = tensor_fields<N>(object);
        using Element = std::remove_const_t<T>;
        if (fields[1] != static_cast<int64_t>(type_of<Element>())) fail(PyExc_TypeError, "expected a tensor of another dtype");
        check_address<N>(fields, sizeof(Element));
        View<T, N> view{reinterpret_cast<T*>(fields[0]), {}, {}};
        for (int d = 0; d < N; ++d) view.size[d] = fields[2 + d], view.stride[d] = fields[2 + N + d];
        return view;
    }
};
template <int N>
struct Argument<Floats<N>> {
    static Floats<N> from(PyObject* object) {
        const auto fields = tensor_fields<N>(object);
        if (fields[1] > static_cast<int64_t>(Type::f16) || fields[1] < 0)
            fail(PyExc_TypeError, "expected a tensor of float32, bfloat16 or float16");
        check_address<N>(fields, fields[1] == static_cast<int64_t>(Type::f32) ? 4 : 2);
        Floats<N> view{reinterpret_cast<void*>(fields[0]), static_cast<Type>(fields[1]), {}, {}};
        for (int d = 0; d < N; ++d) view.size[d] = fields[2 + d], view.stride[d] = fields[2 + N + d];
        return view;
    }
};
template <class V>
struct Argument<Maybe<V>> {
    static Maybe<V> from(PyObject* object) {
        if (object == Py_None) return {false, {}};
        return {true, Argument<V>::from(object)};
    }
};

// --- a kernel as a Python function ---

template <class T>
T argument(PyObject* const* arguments, std::size_t index) {
    try {
        return Argument<T>::from(arguments[index]);
    } catch (const Failed&) {
        PyObject *kind, *value, *trace;
        PyErr_Fetch(&kind, &value, &trace);
        PyErr_Format(kind, "argument %zu: %S", index, value ? value : Py_None);
        Py_XDECREF(kind), Py_XDECREF(value), Py_XDECREF(trace);
        throw;
    }
}

template <class... T, std::size_t... Index>
std::tuple<T...> arguments_of(PyObject* const* arguments, std::index_sequence<Index...>) {
    return std::tuple<T...>{argument<T>(arguments, Index)...};
}

template <class... T>
PyObject* run(void (*kernel)(T...), PyObject* const* arguments, Py_ssize_t count) {
    if (count != static_cast<Py_ssize_t>(sizeof...(T)))
        return PyErr_Format(PyExc_TypeError, "expected %zu arguments, got %zd", sizeof...(T), count);
    try {
        // The last argument of every kernel.
        if (integer(arguments[count - 1]) < 1) fail(PyExc_ValueError, "threads: expected at least 1");
        const std::tuple<T...> converted = arguments_of<T...>(arguments, std::index_sequence_for<T...>{});
        PyThreadState* state = PyEval_SaveThread();
        try {
            std::apply(kernel, converted);
        } catch (...) {
            PyEval_RestoreThread(state);
            throw;
        }
        PyEval_RestoreThread(state);
    } catch (const Failed&) {
        return nullptr;
    } catch (const std::invalid_argument& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
        return nullptr;
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
    Py_RETURN_NONE;
}

#if defined(__x86_64__)
#define VGPO_CHOOSE(name) (capability == 2 ? avx512::name : capability == 1 ? avx2::name : portable::name)
#else
#define VGPO_CHOOSE(name) (portable::name)
#endif
#define VGPO_DEFINE(name)                                                              \
    PyObject* call_##name(PyObject*, PyObject* const* arguments, Py_ssize_t count) {   \
        return run(VGPO_CHOOSE(name), arguments, count);                               \
    }
VGPO_KERNELS(VGPO_DEFINE)

// A cast through void* quiets the compiler about the other signature, which METH_FASTCALL announces.
#define VGPO_METHOD(name) \
    {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_##name)), METH_FASTCALL, nullptr},
PyMethodDef methods[] = {
    VGPO_KERNELS(VGPO_METHOD)
    {"capability", get_capability, METH_NOARGS, "The instruction set that kernels use."},
    {"capabilities", capabilities, METH_NOARGS, "Those that this processor has, best last."},
    {"set_capability", set_capability, METH_O, "Makes kernels use that instruction set."},
    {"set_parallel_for", set_parallel_for, METH_O,
     "Makes kernels run on the threads of the torch_parallel_for at that address; 0: on the caller's alone."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_csrc", "CPU kernels of vgpo-kernels.", -1, methods, nullptr, nullptr,
                          nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__csrc() {
    capability = best_capability();
    return PyModule_Create(&definition);
}
