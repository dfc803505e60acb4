from launch.environment import set_library_defaults

set_library_defaults()  # before torch is imported, as the commands do
