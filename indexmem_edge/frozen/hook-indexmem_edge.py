"""PyInstaller's hook for `import indexmem_edge`: libraries that ctypes loads, the demo sidecar, late imports."""

from PyInstaller.utils.hooks import collect_data_files, collect_dynamic_libs

# They are loaded by path, out of this very folder, and find each other there.
binaries = collect_dynamic_libs("indexmem_edge", destdir="indexmem_edge/lib")
datas = collect_data_files("indexmem_edge", includes=["data/*.gguf", "lib/LICENSE*"])

# The version of our copy of llama-cpp-python is read out of its source before it is imported.
module_collection_mode = {"indexmem_edge._vendor": "pyz+py"}

# Imported once `Llama` is first asked for, where analysis of the code does not look.
hiddenimports = ["indexmem_edge.llama", "indexmem_edge.stats", "indexmem_edge._vendor.llama_cpp"]

# The command line and training are programs of their own; what they import is large.
excludedimports = [
    "torch",
    "matplotlib",
    "indexmem_edge.cli",
    "indexmem_edge.train",
    "indexmem_edge.bench",
    "indexmem_edge.convert",
]
