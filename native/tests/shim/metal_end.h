// the words of Metal mean nothing from here on

#undef kernel
#undef device
#undef constant
#undef threadgroup
#undef thread
