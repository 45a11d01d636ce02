# SPDX-License-Identifier: BSD-3-Clause
"""Builds the host kernels and the shared memory, if there is a C++ compiler; pyproject.toml has the other metadata.

The four step files are compiled once per instruction set, each into a namespace of its own; run.cpp chooses one of
them at run time. Without a compiler the install goes on, and the layer uses the kernels in plain torch.

    SYNCBN_CXXFLAGS    more flags for compiler and linker, for example -fsanitize=address,undefined
    SYNCBN_REPOSITORY  the public address of the repository, for links of the package; mkdocs.yml reads it, too
    SYNCBN_SITE        that of the built pages
"""

import os
import platform
import re
import shlex
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HOST = Path("syncbn/kernels/host")
STEPS = ("local_moments", "normalize", "backward_sums", "backward_input")
# -ffp-contract=off: a multiply and an add fused in the vector code and not in another would change bits.
FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra"]
X86 = platform.machine() in ("x86_64", "AMD64")
INSTRUCTION_SETS = {"baseline": []}
if X86:
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    quiet = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # gcc 12 on its own AVX-512 header
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
    INSTRUCTION_SETS |= {"avx2": avx2, "avx512": [*avx2, *avx512, *quiet]}


class BuildHostKernels(build_ext):
    """Compiles the step files several times, then the extension as usual."""

    def build_extension(self, ext: Extension) -> None:
        """Adds the objects of every instruction set to the extension."""
        more = shlex.split(os.environ.get("SYNCBN_CXXFLAGS", ""))
        ext.extra_compile_args = [*FLAGS, *more]
        ext.extra_link_args = more
        if "kernels" not in ext.name:
            return super().build_extension(ext)
        for name, flags in INSTRUCTION_SETS.items():
            ext.extra_objects += self.compiler.compile(
                [str(HOST / f"{step}.cpp") for step in STEPS],
                output_dir=str(Path(self.build_temp, name)),
                macros=[("SYNCBN_ISA", name)],
                extra_postargs=[*ext.extra_compile_args, *flags],
                depends=ext.depends,
            )
        return super().build_extension(ext)


REPOSITORY, SITE = (os.environ.get(name, "").rstrip("/") for name in ("SYNCBN_REPOSITORY", "SYNCBN_SITE"))


def readme() -> str:
    """Returns README.md. Its links lead to the repository, if there is an address: a package index has no files."""
    text = Path("README.md").read_text(encoding="utf-8")
    if not REPOSITORY:
        return text
    text = re.sub(r'(!\[[^\]]*\]\(|\b(?:src|srcset)=")(?!\w+:)', rf"\1{REPOSITORY}/raw/HEAD/", text)
    return re.sub(r"(\]\()(?!\w+:|#)", rf"\1{REPOSITORY}/blob/HEAD/", text)


def urls() -> dict[str, str]:
    """Returns the addresses of the project that are known."""
    changes = f"{REPOSITORY}/blob/HEAD/CHANGELOG.md" if REPOSITORY else ""
    known = {"Repository": REPOSITORY, "Documentation": SITE, "Changelog": changes}
    return {name: url for name, url in known.items() if url}


LIMITED = ("Py_LIMITED_API", "0x030B0000")
SHARED_MEMORY = Extension(
    "syncbn.transports._segment",
    ["syncbn/transports/segment.cpp"],
    depends=["syncbn/transports/segment.hpp"],
    define_macros=[LIMITED],
    language="c++",
    py_limited_api=True,
    optional=True,
)

setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    project_urls=urls(),
    ext_modules=[
        *([SHARED_MEMORY] if sys.platform == "linux" else []),
        Extension(
            "syncbn.kernels.host._host",
            [str(HOST / f"{name}.cpp") for name in ("module", "parallel", "run", "tensors")],
            depends=[str(header) for header in sorted(HOST.glob("*.hpp"))],
            define_macros=[LIMITED, *([("SYNCBN_X86", "1")] if X86 else [])],
            language="c++",
            py_limited_api=True,
            optional=True,
        ),
    ],
    cmdclass={"build_ext": BuildHostKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
