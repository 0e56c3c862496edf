"""The C extension: what pyproject.toml cannot say.

`logitloss._kernels.cython_cpu` is one Cython file plus the C rows in `_kernels/c/*.c`. A row file names its
instruction set in a pragma of its own, so that all files share one set of flags and the wheel runs on any
processor. OpenMP is probed by building a small program; without it the package works with one thread.

Environment: LOGITLOSS_NO_OPENMP=1 builds without OpenMP; LOGITLOSS_SANITIZE=1 builds with the address and
undefined-behaviour sanitizers (run it as `.ci/run` does).
"""

import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

# No -march=native: the wheel serves every processor. No -ffast-math: it breaks inf and NaN, and linking it in
# sets flush-to-zero for the whole process. No contraction: a*b + c must round alike in every stamp; where fma
# is wanted, it is asked for by name.
FLAGS = ["-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SANITIZE_FLAGS = [*SANITIZERS, "-O1", "-g", "-fno-omit-frame-pointer", "-DLOGITLOSS_POISON"]

OPENMP_CANDIDATES = [(["-fopenmp"], ["-fopenmp"])]
if sys.platform == "darwin":
    OPENMP_CANDIDATES.append((["-Xpreprocessor", "-fopenmp"], ["-lomp"]))
OPENMP_PROGRAM = """
#include <omp.h>
int logitloss_probe(void);
int logitloss_probe(void)
{
    int n = 0;
#pragma omp parallel reduction(+ : n)
    n += omp_get_num_threads();
    return n;
}
"""


def wanted(variable):
    return os.environ.get(variable, "0") not in ("", "0")


class BuildRows(build_ext):
    def initialize_options(self):
        super().initialize_options()
        self.cython_c_in_temp = True

    def finalize_options(self):
        super().finalize_options()
        # The environment's variables decide too, so no file's age tells whether what is built is current.
        self.force = True

    def build_extension(self, ext):
        openmp_compile, openmp_link = self.openmp_flags()
        ext.extra_compile_args = [*FLAGS, *openmp_compile]
        ext.extra_link_args = [*openmp_link]
        if wanted("LOGITLOSS_SANITIZE"):
            ext.extra_compile_args += SANITIZE_FLAGS
            ext.extra_link_args += SANITIZERS
        rows = [source for source in ext.sources if source.endswith(".c")]
        ext.sources = [source for source in ext.sources if not source.endswith(".c")]
        ext.extra_objects = self.compile_at_once(ext, rows)
        super().build_extension(ext)

    def compile_at_once(self, ext, sources):
        """Compile the C rows side by side: every stamp is some seconds of one core, and there are several."""
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)

        def compile_one(source):
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=ext.include_dirs,
                macros=ext.define_macros,
                debug=self.debug,
                extra_postargs=ext.extra_compile_args,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return [name for names in pool.map(compile_one, sources) for name in names]

    def openmp_flags(self):
        if not wanted("LOGITLOSS_NO_OPENMP"):
            for flags in OPENMP_CANDIDATES:
                if self.links(OPENMP_PROGRAM, *flags):
                    return flags
        print("logitloss: built without OpenMP, works with one thread", file=sys.stderr)
        return [], []

    def links(self, program, compiler, linker):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text(program)
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=compiler)
                target = str(Path(folder, "probe.so"))
                self.compiler.link_shared_object(objects, target, extra_postargs=linker)
            except (CompileError, LinkError):
                return False
        return True


cython_cpu = Extension(
    "logitloss._kernels.cython_cpu",
    sources=["_kernels/cython_cpu.pyx", *sorted(glob("_kernels/c/*.c"))],
    depends=sorted(glob("_kernels/c/*.h")),
    include_dirs=["_kernels/c", numpy.get_include()],
    libraries=["m"],
    define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
)

setup(ext_modules=[cython_cpu], cmdclass={"build_ext": BuildRows})
