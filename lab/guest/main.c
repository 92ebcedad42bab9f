/* The guest tools as one static program: its name says which tool. Owns the dispatch; each tool has its own file. */
#include <stdio.h>
#include <string.h>
#include "tools.h"

int main(int argc, char **argv)
{
    const char *name = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
    if (!strcmp(name, "s32tool") && argc > 1) { argv++; argc--; name = argv[0]; }
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (!strcmp(name, "addr6")) return addr6(argc, argv);
    if (!strcmp(name, "frames")) return frames(argc, argv);
    if (!strcmp(name, "probe")) return probe(argc, argv);
    if (!strcmp(name, "stream")) return stream(argc, argv);
    if (!strcmp(name, "serve")) return serve(argc, argv);
    fprintf(stderr, "usage: addr6 | frames | probe | serve | stream (as s32tool NAME ... or through a link of that name)\n");
    return 2;
}
