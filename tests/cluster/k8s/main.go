// Command sluice-k8s is a whole Kubernetes in one binary: every component of a control plane and a node, with etcd,
// CoreDNS, kubectl and helm. The first argument names the one to run, and so does the name the binary is called by:
//
//	sluice-k8s kubelet --config kubelet.yaml
//	kubectl get pods        (a link named kubectl)
//
// All of them come as Go packages from the module proxy, at the versions in go.mod, so that a test cluster needs no
// image registry and no download of release binaries; and in one binary, because they share most of their code: built
// apart they take three times as long.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/health"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/ready"
	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/etcdmain"
	helm "helm.sh/helm/v4/pkg/cmd"
	"helm.sh/helm/v4/pkg/kube"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectl "k8s.io/kubectl/pkg/cmd"
	"k8s.io/kubectl/pkg/cmd/util"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

// component runs one program with os.Args as that program would see them, and returns its exit code.
type component func() int

func daemon(command func() *cobra.Command) component {
	return func() int { return cli.Run(command()) }
}

var components = map[string]component{
	"kube-apiserver":          daemon(apiserver.NewAPIServerCommand),
	"kube-controller-manager": daemon(controllermanager.NewControllerManagerCommand),
	"kube-scheduler":          daemon(func() *cobra.Command { return scheduler.NewSchedulerCommand() }),
	"kube-proxy":              daemon(proxy.NewProxyCommand),
	"kubelet":                 daemon(func() *cobra.Command { return kubelet.NewKubeletCommand(context.Background()) }),
	"kubectl":                 runKubectl,
	"helm":                    runHelm,
	"etcd":                    runEtcd,
	"coredns":                 runCoreDNS,
}

func runKubectl() int {
	if err := cli.RunNoErrOutput(kubectl.NewDefaultKubectlCommand()); err != nil {
		util.CheckErr(err) // prints as kubectl does, and exits
	}
	return 0
}

func runHelm() int {
	kube.ManagedFieldsManager = "helm" // not the name of this binary
	command, err := helm.NewRootCmd(os.Stdout, os.Args[1:], helm.SetupLogging)
	if err != nil {
		slog.Warn("command failed", slog.Any("error", err))
		return 1
	}
	if err := command.Execute(); err != nil {
		var coded helm.CommandError
		if errors.As(err, &coded) {
			return coded.ExitCode
		}
		return 1
	}
	return 0
}

func runEtcd() int {
	etcdmain.Main(os.Args)
	return 0
}

// runCoreDNS serves cluster names only: the plug-ins imported above, in the order in which CoreDNS would run them.
func runCoreDNS() int {
	dnsserver.Directives = []string{"errors", "health", "ready", "kubernetes"}
	flag.CommandLine.Init("coredns", flag.ExitOnError)
	coremain.Run()
	return 0
}

func main() {
	name := filepath.Base(os.Args[0])
	if _, ok := components[name]; !ok && len(os.Args) > 1 {
		name, os.Args = os.Args[1], os.Args[1:]
	}
	run, ok := components[name]
	if !ok {
		names := slices.Sorted(maps.Keys(components))
		fmt.Fprintf(os.Stderr, "sluice-k8s: no component %q; the first argument is one of: %s\n", name, strings.Join(names, ", "))
		os.Exit(2)
	}
	os.Args[0] = name
	os.Exit(run())
}
