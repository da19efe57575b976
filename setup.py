"""What pyproject.toml has no word for: jobs/ and site_configs/ travel in the wheel, as cfe_hpc/shipped/."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithShipped(build_py):
    """Copies the job files and site profiles beside the modules; an editable install reads them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for kind in ("jobs", "site_configs"):
            target = Path(self.build_lib, "cfe_hpc", "shipped", kind)
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            for source in sorted(Path(kind).glob("*.toml")):
                shutil.copyfile(source, target / source.name)


setup(cmdclass={"build_py": BuildWithShipped})
